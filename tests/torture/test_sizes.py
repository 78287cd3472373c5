"""Sizes: numbers of tokens and rows that are equal to a width, a count of heads or blocks; prompts and texts that are very long."""

import gc

import pytest
import torch
import transformers
from tolerances import all_close, differs

from hf_tokens import HFTokensError, UnsupportedError, anatomy, get_token_model
from hf_tokens.testing import probe_config, zoo

OF_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "token_type_ids"}
IN_SHORT = ("llama", "gpt2", "bert", "t5", "falcon", "mamba")
PARTS = 8


def of_text(family):
    """A specimen of a family that takes nothing but text; None for another."""
    specimen = zoo.build(family)
    return specimen if "input_ids" in specimen.inputs and set(specimen.inputs) <= OF_TEXT else None


def resized(specimen, rows, n):
    """Inputs of so many rows and tokens."""
    generator = torch.Generator().manual_seed(rows * 1000 + n)
    kinds = {
        "attention_mask": lambda: torch.ones(rows, n, dtype=torch.long),
        "token_type_ids": lambda: torch.zeros(rows, n, dtype=torch.long),
    }
    return {name: kinds.get(name, lambda: torch.randint(5, 80, (rows, n), generator=generator))() for name in specimen.inputs}


def run(model, inputs):
    with torch.no_grad():
        return zoo.tensors(model(**inputs))


def by_itself(model, inputs):
    """What each row gets alone, put together."""
    alone = [run(model, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(len(inputs["input_ids"]))]
    return [torch.cat(parts) for parts in zip(*alone, strict=True)]


def sizes(model):
    """Numbers that a stream of a model has for something else than its tokens."""
    streams = anatomy(model).streams
    return sorted({value for s in streams for value in (s.width, s.heads, s.kv_heads, s.head_dim, len(s), 2) if value and 2 <= value <= 64})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_a_batch_is_each_row_alone_whatever_its_sizes_are_equal_to(amount, count, part):
    whole = [family for family in zoo.families("transformers") if family not in zoo.unbuildable() and not zoo.is_part(family)]
    for family in amount(whole, IN_SHORT)[part::PARTS]:
        specimen = of_text(family)
        try:
            model = None if specimen is None else get_token_model(zoo.build(family).model, probe_config(0.5)).eval()
        except HFTokensError:
            count["families refused"] += 1
            continue
        if model is None:
            continue
        count["families"] += 1
        for n in sizes(specimen.model):
            for rows in sorted({2, min(n, 4)}):
                inputs, what = resized(specimen, rows, n), f"{family}: {rows} rows of {n} tokens"
                try:
                    base = run(specimen.model, inputs)
                    alike = not differs(base, by_itself(specimen.model, inputs))
                except Exception:  # the base takes no such size
                    count["not the base's"] += 1
                    continue
                try:
                    out = run(model, inputs)
                    if alike:
                        all_close(out, by_itself(model, inputs), what)
                    count["right" if alike else "differ in the base already"] += 1
                except UnsupportedError:
                    count["refused"] += 1


LONG = {
    "none": [],
    "prefixkv": ["prefixkv"],
    "d2o": ["d2o"],
    "ftp": ["ftp"],
    "a probe": probe_config(0.5),
}


@pytest.mark.parametrize("methods", LONG.values(), ids=LONG)
def test_a_long_prompt_and_a_long_text_take_no_more_memory_at_the_end(amount, count, methods):
    config = transformers.LlamaConfig(
        **dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=99),
        max_position_embeddings=1 << 16,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model = get_token_model(model, methods).eval() if methods else model
    prompt, new = amount(32_768, 512), amount(5_000, 48)
    out = model.generate(
        input_ids=torch.randint(5, 80, (1, prompt)), max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert out.sequences.shape == (1, prompt + 2)
    del out
    count["tokens of a prompt"] += prompt
    held = Held()
    ids = torch.randint(5, 80, (1, 64))
    model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, stopping_criteria=[held])
    count["tokens written"] += new
    gc.collect()
    half, last = held.noted[len(held.noted) // 2], held.noted[-1]
    assert last - half <= 64, f"{last - half} tensors more at the end"


class Held:
    """Notes how many tensors there are behind each token."""

    def __init__(self):
        self.noted, self.at = [], 0

    def __call__(self, ids, scores, **more):
        self.at += 1
        if self.at % 16 == 0:
            self.noted.append(sum(1 for item in gc.get_objects() if type(item) is torch.Tensor))
        return torch.zeros(len(ids), dtype=torch.bool)
