"""The safety meta token and its head against slow loops, written from their description in arXiv:2506.04704."""

import math

import pytest
import torch
from by_hand import IMAGE, llava, prompts
from tolerances import close
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_tokens import (
    ConfigError,
    Dims,
    SafeLLaVA,
    SafeLLaVAConfig,
    aux_loss,
    conclusions,
    get_token_model,
    load,
)

# per case: images of each row, side of the padding, meta tokens
CASES = {
    "one picture": ([1], "left", 1),
    "padded": ([1, 2, 1], "left", 1),
    "padded behind": ([2, 1], "right", 3),
    "one row without a picture": ([1, 0], "left", 2),
    "no token": ([1, 1], "left", 0),
}


def naive(states, p):
    """log-probabilities of the categories, given what became of the meta tokens, a list of vectors."""
    mean = [sum(state[i] for state in states) / len(states) for i in range(len(states[0]))]
    mu = sum(mean) / len(mean)
    var = sum((x - mu) ** 2 for x in mean) / len(mean)
    z = torch.stack([(x - mu) / torch.sqrt(var + 1e-5) for x in mean]) * p["0.weight"] + p["0.bias"]
    h = p["1.weight"] @ z + p["1.bias"]
    h = torch.stack([x * 0.5 * (1 + math.erf(float(x) / math.sqrt(2))) for x in h])
    logits = p["3.weight"] @ h + p["3.bias"]
    total = sum(math.exp(float(x)) for x in logits)
    return torch.stack([x - math.log(total) for x in logits])


def by_paper(base, given, row, token):
    """Logits of the text of one row and the last state of the meta tokens: they stand behind the last visual token."""
    ids, real = given["input_ids"][row], given["attention_mask"][row].bool()
    inner, features = base.model, iter(base.model.get_image_features(given["pixel_values"]).pooler_output)
    before = int((given["input_ids"][:row] == IMAGE).sum()) // 9
    for _ in range(before):
        next(features)
    hidden, places, is_meta = [], [], []
    own = ids[real].tolist()
    patches = iter(torch.cat([next(features) for _ in range(own.count(IMAGE) // 9)])) if IMAGE in own else iter(())
    last = max((i for i, id_ in enumerate(own) if id_ == IMAGE), default=None)
    for i, id_ in enumerate(own):
        hidden.append(next(patches) if id_ == IMAGE else inner.language_model.embed_tokens.weight[id_])
        places.append(i)
        is_meta.append(False)
        if i == last:
            hidden += list(token)
            places += [i] * len(token)
            is_meta += [True] * len(token)
    x = torch.stack(hidden)[None]
    rotary = inner.language_model.rotary_emb(x, position_ids=torch.tensor([places]))
    n = len(places)
    mask = torch.zeros(1, 1, n, n, dtype=x.dtype).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(x.dtype).min)
    for block in inner.language_model.layers:
        x = type(block).forward(block, x, attention_mask=mask, position_embeddings=rotary)
    meta = torch.tensor(is_meta)
    return base.lm_head(inner.language_model.norm(x[0, ~meta])), x[0, meta]


def surgery(base, **knobs):
    model = get_token_model(base, SafeLLaVAConfig(categories=4, hidden=5, **knobs)).eval()
    (method,) = [module for module in model.modules() if isinstance(module, SafeLLaVA)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model, method


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_model_is_the_loop(case):
    images, side, tokens = CASES[case]
    given = prompts(images, side=side)
    model, method = surgery(llava(layers=3), tokens=tokens)
    places = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # rotary tables are float32: only the same places are the same
    got = model(**given, position_ids=places, use_cache=False).logits
    told = conclusions(model)
    base = llava(layers=3)
    for row, count in enumerate(images):
        logits, states = by_paper(base, given, row, method.token)
        close(got[row, given["attention_mask"][row].bool()], logits, f"row {row}")
        if tokens and count:
            close(
                told["default.0"][row].log_softmax(dim=-1), naive(list(states), dict(method.head.named_parameters(remove_duplicate=False)))
            )
    assert bool(told) == bool(tokens)


def test_the_loss_is_the_cross_entropy_of_rows_with_a_label():
    given = prompts([1, 1, 1])
    model, method = surgery(llava(layers=2), weight=0.5)
    labels = torch.tensor([2, -100, 0])
    model.train()(**given, hf_tokens_targets=labels)
    loss = aux_loss(model)
    told = conclusions(model)["default.0"].log_softmax(dim=-1)
    close(loss.detach(), -0.5 * (told[0, 2] + told[2, 0]) / 2)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in method.parameters())
    model.zero_grad()
    model(**given)  # without labels nothing is to be learnt
    assert float(aux_loss(model)) == 0


def test_a_chat_goes_on_from_what_the_meta_token_said():
    """Tokens that are generated have no picture: the conclusion stays, and the cache equals the whole sequence."""
    given = prompts([1, 2])
    model, _ = surgery(llava(layers=3))
    out = model.generate(**given, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    told = conclusions(model)["default.0"]
    n = given["input_ids"].shape[1]
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 4), value=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    whole = model(**{**given, "input_ids": out.sequences[:, :-1], "attention_mask": mask}, position_ids=places, use_cache=False).logits
    for step, logits in enumerate(out.logits):
        close(logits, whole[:, n - 1 + step].float())
    close(conclusions(model)["default.0"], told)


class Pictures(Dataset):
    """Bright pictures are of category 1, dark ones of 0."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        given = prompts([1], seed=i)
        label = i % 2
        pixels = given["pixel_values"][0] * 0.3 + (1.0 if label else -1.0)
        labels = given["input_ids"][0]
        return {**{k: v[0] for k, v in given.items()}, "pixel_values": pixels, "labels": labels, "hf_tokens_targets": torch.tensor(label)}


def test_trainer_teaches_it_to_tell_pictures_apart(tmp_path):
    model = get_token_model(llava(layers=2).float(), SafeLLaVAConfig(categories=2, hidden=16))
    arguments = TrainingArguments(tmp_path, max_steps=40, per_device_train_batch_size=8, learning_rate=3e-2, report_to=[], use_cpu=True,
                                  save_strategy="no", logging_steps=50, seed=0, remove_unused_columns=False,
                                  disable_tqdm=True)  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Pictures()).train()
    model.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter", llava(layers=2).float()).eval()
    right = 0
    for i in range(16):
        given = prompts([1], seed=100 + i)
        pixels = (given["pixel_values"] * 0.3 + (1.0 if i % 2 else -1.0)).float()
        with torch.no_grad():
            model(**{**given, "pixel_values": pixels})
        right += int(conclusions(model)["default.0"].argmax()) == i % 2
    assert right >= 14


def test_what_it_refuses():
    model, _ = surgery(llava(layers=2))
    given = prompts([1, 1])
    with pytest.raises(ConfigError, match="hf_tokens_targets"):
        model(**given, hf_tokens_targets=torch.tensor([4, 0]))
    with pytest.raises(ConfigError, match="hf_tokens_targets"):
        model(**given, hf_tokens_targets=torch.tensor([[1, 0]]))
    assert SafeLLaVA(SafeLLaVAConfig(), Dims(8, 2, 2, 4, 0, 1, "text", True)).follow(
        torch.tensor([[0, 1, 0, 1, 1, 0]]).bool()
    ).tolist() == [[False, False, False, False, True, False]]


def test_a_trainer_that_drops_the_labels_says_so(tmp_path):
    model = get_token_model(llava(layers=2).float(), SafeLLaVAConfig(categories=2, hidden=4))
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    with pytest.warns(UserWarning, match="remove_unused_columns=False"):
        Trainer(model=model, args=arguments, train_dataset=Pictures()).train()
