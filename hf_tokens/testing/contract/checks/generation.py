"""Generation: with a cache as without, in beams, in chunks, over turns; a padded row as that row alone; a static cache right or refused."""

import logging

import pytest
import torch
from transformers.generation import ContinuousBatchingConfig

from hf_tokens.errors import UnsupportedError
from hf_tokens.testing.tolerances import all_close, close
from hf_tokens.testing.zoo import CACHE
from hf_tokens.tools.surgeries import surgery_of

from ..architectures import BATCH, PADS
from ..cases import drawn
from ..pairs import LOCAL, MAYBE, generated

NEW = 4


def continued_ids(pair):
    """The tokens that the model continues."""
    return "decoder_input_ids" if "decoder_input_ids" in pair.inputs else "input_ids"


def caches(pair):
    return pair.info.cls.caches


def looks_ahead(pair, model):
    """Whether what comes later changes what the model said before: then a prompt that grows is not the prompt that was cached."""
    ids = continued_ids(pair)
    row, inputs = pair.row, pair.row.with_positions(pair.inputs)
    n = inputs[ids].shape[1]
    shorter = {k: v[:, :-1] if k in (ids, *(PER_TEXT if ids == "input_ids" else ())) else v for k, v in inputs.items()}
    with torch.no_grad():
        short, long = row.read(model(**shorter))[0], row.read(model(**inputs))[0]
    try:
        close(short, long[:, : n - 1])
    except AssertionError:
        return True
    return False


PER_TEXT = ("attention_mask", "mm_token_type_ids", "position_ids")


def is_causal(pair, model):
    """Whether the method must say the same with a cache as without."""
    looks = LOCAL if pair.info.role == "LayerRouter" else LOCAL | MAYBE  # one that looks at a sample's tokens looks at all of them
    if pair.info.role == "CacheCompressor" or not caches(pair) or not set(pair.info.cls.signals) <= looks:
        return False
    ahead = looks_ahead(pair, model)
    assert not (ahead and set(pair.info.cls.signals) <= LOCAL), "a token that came later changed what came before it"
    return not ahead


def first_turn(pair, model, new=NEW, **more):
    """A generation that keeps its cache."""
    torch.manual_seed(0)
    given = {k: v for k, v in pair.inputs.items() if k != "decoder_input_ids"}
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, **more)


def length_of(pair):
    return 1 if "decoder_input_ids" in pair.inputs else pair.inputs["input_ids"].shape[1]


def test_without_a_cache(talker):
    model = talker.attach()
    uncached = generated(model, talker.inputs, NEW, use_cache=False)
    assert uncached[0].shape[1] == length_of(talker) + NEW
    if is_causal(talker, model):
        all_close(generated(model, talker.inputs, NEW), uncached, "cached")
    elif not caches(talker):
        with pytest.raises(UnsupportedError, match="must see the whole sequence in one pass"):
            generated(model, talker.inputs, NEW, use_cache=True)


def test_zero_strength_generates_as_the_base(talker):
    model = talker.attach(config=talker.config.at_zero(), stirred=False)
    cache = {} if caches(talker) else {"use_cache": False}
    all_close(generated(model, talker.inputs, NEW, **cache), generated(talker.base(), talker.inputs, NEW, **cache), "zero strength")


@drawn
@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_row_is_that_row_alone(padded_talker, beams):
    talker = padded_talker
    model, cache = talker.attach(), {} if caches(talker) else {"use_cache": False}
    more = {**cache, "num_beams": beams}
    row, padded = talker.row, talker.row.padded(talker.inputs, "left")
    ids, *logits = generated(model, padded, NEW, **more)
    for i in range(BATCH):
        alone, *steps = generated(model, row.alone(talker.inputs, i, PADS * i), NEW, **more)
        assert ids[i, -NEW:].tolist() == alone[0, -NEW:].tolist(), f"row {i}"
        if beams == 1:
            all_close([step[i : i + 1] for step in logits], steps, f"row {i}")


def test_a_padded_batch_goes_on_under_an_autocast(padded_talker):
    talker = padded_talker
    if talker.info.role != "CacheCompressor":
        return  # their blocks do in a cache what they do without one
    model, padded = talker.attach(), talker.row.padded(talker.inputs, "left")
    with torch.autocast("cpu", torch.bfloat16):
        said = generated(model, padded, NEW)
    assert all(t.isfinite().all() for t in said)


def test_the_cache_counts_the_tokens_seen(talker):
    if not caches(talker):
        return
    with torch.no_grad():
        ours, base = (model(**talker.inputs, use_cache=True).past_key_values for model in (talker.attach(), talker.base()))
    assert ours.get_seq_length() == base.get_seq_length() == talker.inputs[continued_ids(talker)].shape[1]


def test_a_second_turn(talker):
    if not caches(talker) or "decoder_input_ids" in talker.inputs:
        return
    model = talker.attach()
    first = first_turn(talker, model)
    ids = torch.cat([first.sequences, torch.randint(5, 80, (BATCH, 3))], dim=1)
    given = {**talker.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in given:
        pad = ids.shape[1] - given["mm_token_type_ids"].shape[1]
        given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, pad))
    text = {name: given[name] for name in (*PER_TEXT, "input_ids") if name in given}  # the cache has seen the images
    kept = generated(model, text, NEW, **{CACHE: first.past_key_values})
    assert kept[0].shape[1] == ids.shape[1] + NEW and all(t.isfinite().all() for t in kept)
    assert first.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    if is_causal(talker, model):
        all_close(kept, generated(model, given, NEW), "second turn")


def test_chunked_prefill(talker):
    if not caches(talker) or talker.row.streams != ("text*",):
        return
    model, ids = talker.attach(), talker.inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        try:
            head = model(input_ids=ids[:, :7], use_cache=True)
            tail = model(input_ids=ids[:, 7:], **{CACHE: head.past_key_values}, use_cache=True)
        except UnsupportedError as error:
            assert "in chunks" in str(error)
            return
    assert tail.past_key_values.get_seq_length() == whole.past_key_values.get_seq_length() == ids.shape[1]
    if is_causal(talker, model):
        close(torch.cat([head.logits, tail.logits], dim=1), whole.logits, "chunks")


def test_a_static_cache_is_right_or_refused(talker):
    if not caches(talker):
        return
    model = talker.attach()
    try:
        static = generated(model, talker.inputs, NEW, cache_implementation="static", disable_compile=True)
    except UnsupportedError as error:
        assert "needs a dynamic cache, got a cache of Static" in str(error)
        return
    all_close(static, generated(model, talker.inputs, NEW), "static cache")


def test_sampling_and_prompt_lookup_run(talker):
    if not caches(talker) or talker.row.streams != ("text*",):
        return
    model = talker.attach()
    one = talker.row.alone(talker.inputs, 0)
    with torch.no_grad():
        assert model.generate(**one, max_new_tokens=NEW, do_sample=True, num_return_sequences=2).shape[0] == 2
        plain = model.generate(**one, max_new_tokens=6, do_sample=False)
        begun = []
        hook = surgery_of(model).base.register_forward_pre_hook(lambda *_: begun.append(True))
        try:
            looked = model.generate(**one, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
        except UnsupportedError as error:
            assert "assisted decoding" in str(error) and not begun
            return
        hook.remove()
    if is_causal(talker, model):
        assert torch.equal(plain, looked)


def test_continuous_batching_is_generation_or_refused(talker, caplog):
    if "decoder_input_ids" in talker.inputs:
        return  # transformers has none for them
    caplog.set_level(logging.CRITICAL, "ContinuousBatchingLogger")  # it tells of each run
    ids, model = talker.inputs["input_ids"] % 80, talker.attach()
    prompts = [ids[0].tolist(), ids[1, PADS:].tolist()]
    model.generation_config.update(suppress_tokens=None, eos_token_id=-1, max_new_tokens=NEW, do_sample=False)
    small = ContinuousBatchingConfig(max_batch_tokens=64, max_memory_percent=0.001)
    try:
        answers = model.generate_batch(prompts, continuous_batching_config=small)
    except UnsupportedError as error:
        assert "Continuous batching" in str(error)
        return
    have = sorted((len(answer.prompt_ids), answer.generated_tokens, answer.error) for answer in answers.values())
    alone = [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long()) for prompt in prompts]
    want = sorted((len(prompt), row[0, len(prompt) :].tolist(), None) for prompt, row in zip(prompts, alone, strict=True))
    assert have == want
