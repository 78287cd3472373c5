"""R2R against its paper: sections 3 and 4 of arXiv:2505.21600 (path-following labels, the router, token-level routing)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, lm_head, positions
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_tokens import R2R, ConfigError, R2RConfig, UnsupportedError, aux_loss, get_token_model, label_routes, load, route_to
from hf_tokens.testing import zoo


def norm(u):
    mean = sum(u) / len(u)
    spread = math.sqrt(sum((v - mean) ** 2 for v in u) / len(u) + 1e-5)
    return [(v - mean) / spread for v in u]


def times(matrix, u):
    return [sum(float(w) * v for w, v in zip(line, u, strict=True)) for line in matrix]


def chance(hidden, logits, table, p, top):
    """The probability that the large model should emit the token: hidden (d) and logits (v) of the small one, embeddings (v d)."""
    highest = sorted((float(z) for z in logits), reverse=True)[:top]
    predicted = table[max(range(len(logits)), key=lambda i: float(logits[i]))]
    seen = [*(float(v) for v in hidden), *highest, *(float(v) for v in predicted)]
    u = [v + float(b) for v, b in zip(times(p["enter"], seen), p["bias"], strict=True)]
    for w1, w2 in zip(p["w1"], p["w2"], strict=True):
        inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in times(w1, norm(u))]
        u = [a + b for a, b in zip(u, times(w2, inner), strict=True)]
    z = times(p["w"], norm(u))[0] + float(p["c"][0])
    return 1 / (1 + math.exp(-z))


def states(base, ids):
    """What the head reads (n d) and says (n v) of one row."""
    x = embed(base, ids, torch.arange(len(ids)))
    for block in blocks(base):
        x = block(x)[0]
    return base.transformer.ln_f(x), lm_head(base, x)


@torch.no_grad()
def naive(small, large, ids, p, top, threshold, steps):
    """Greedy tokens of one row, and which the large model emitted: both models read the whole text at each step."""
    ids, routed = ids.tolist(), []
    for _ in range(steps):
        hidden, logits = states(small, torch.tensor(ids))
        asks = threshold < 1 and chance(hidden[-1], logits[-1], small.transformer.wte.weight, p, top) >= threshold
        told = states(large, torch.tensor(ids))[1][-1] if asks else logits[-1]
        routed.append(asks)
        ids.append(int(told.argmax()))
    return ids[-steps:], routed


# -- the method in a model -------------------------------------------------------------------------------------------


def pair(seed=0, **knobs):
    """A small model with a router that has left its start, its parameters, and a large model."""
    model = get_token_model(gpt2(2, seed), R2RConfig(depth=2, **knobs)).eval()
    router = next(m for m in model.modules() if isinstance(m, R2R))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        p, base = dict(router.named_parameters()), model.get_base_model()
        if 0 < router.config.threshold < 1:  # half of all tokens ask
            odds = lambda q: math.log(q / (1 - q))
            rows = zip(*states(base, batch((30,), seed=9)[0][0]), strict=True)
            heard = sorted(odds(chance(h, z, base.transformer.wte.weight, p, router.enter.shape[1] - 24)) for h, z in rows)
            router.c.add_(odds(router.config.threshold) - heard[15])
    return model, {name: q.detach() for name, q in p.items()}, gpt2(4, seed + 5)


@pytest.mark.drawn
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("threshold", "logits"), [(0.5, 100), (0.3, 7), (0.8, 1), (0.0, 5), (1.0, 5)])
def test_generation_is_the_loop(threshold, logits, use_cache):
    lengths, seen = (13, 7, 1), set()
    for seed in range(2):
        model, p, large = pair(seed, threshold=threshold, logits=logits)
        ids, mask = batch(lengths)
        door = route_to(large)
        told = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
        got = model.generate(**told, custom_generate=door)
        for row, real in enumerate(mask):
            tokens, routed = naive(model.get_base_model(), large, ids[row][real], p, min(logits, 50), threshold, 8)
            assert got[row, 13:].tolist() == tokens
            assert door.routed[row].tolist() == routed
            seen |= set(routed)
    assert seen == ({True} if threshold == 0 else {False} if threshold == 1 else {True, False})


def test_the_ends_are_the_models_alone():
    ids, mask = batch((9, 4))
    for threshold, which in ((1.0, "small"), (0.0, "large")):
        model, _, large = pair(threshold=threshold)
        told = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6}
        for more in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"do_sample": False, "repetition_penalty": 1.5}):
            torch.manual_seed(0)
            got = model.generate(**told, **more, custom_generate=route_to(large))
            torch.manual_seed(0)
            assert torch.equal(got, (model if which == "small" else large).generate(**told, **more))
    model, _, large = pair(threshold=0.0)
    with model.disable_adapter():
        assert torch.equal(
            model.generate(**told, do_sample=False, custom_generate=route_to(large)), model.generate(**told, do_sample=False)
        )


def test_the_large_model_reads_only_what_it_has_not_seen():
    model, _, large = pair(threshold=0.5)
    ids, _ = batch((9,))
    read = []
    large.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    door = route_to(large)
    model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, custom_generate=door)
    asked = door.routed[0].nonzero()[:, 0].tolist()
    assert 1 < len(asked) < 12
    assert read == [9 + asked[0], *(b - a for a, b in zip(asked, asked[1:], strict=False))]


def test_a_text_that_has_ended_asks_no_more():
    model, _, large = pair(threshold=0.0)
    ids, _ = batch((9, 9))
    door = route_to(large)
    first = large.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False)[0, 10].item()
    out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=first, pad_token_id=0, custom_generate=door)
    ends = (out[0, 9:] == first).nonzero()[0, 0].item()
    assert door.routed[0].tolist() == [True] * (ends + 1) + [False] * (door.routed.shape[1] - ends - 1)


def test_what_two_models_cannot_write_together_is_refused():
    model, _, large = pair()
    ids, _ = batch((5,))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=12, n_layer=1, n_head=3, bos_token_id=1, eos_token_id=None))
    told = {"input_ids": ids, "max_new_tokens": 2}
    with pytest.raises(UnsupportedError, match="must share the tokenizer"):
        model.generate(**told, custom_generate=route_to(other))
    with pytest.raises(UnsupportedError, match="greedy decoding or sampling, .* got beam_search"):
        model.generate(**told, num_beams=2, custom_generate=route_to(large))
    with pytest.raises(UnsupportedError, match="which has an encoder"):
        model.generate(**told, custom_generate=route_to(zoo.build("t5").model))
    for family, got in (("jamba", "JambaForCausalLM, which goes on from"), ("recurrent_gemma", "RecurrentGemmaForCausalLM, which keeps")):
        with pytest.raises(UnsupportedError, match=f"got {got} its states"):
            model.generate(**told, custom_generate=route_to(zoo.build(family).model))
    with pytest.raises(UnsupportedError, match="needs a model with a surgery"):
        large.generate(**told, custom_generate=route_to(large))

    class Tokenizer(dict):
        def get_vocab(self):
            return self

    same, more = Tokenizer(a=0), Tokenizer(a=0, b=1)
    with pytest.raises(UnsupportedError, match="differ in 1 tokens"):
        model.generate(**told, custom_generate=route_to(large, tokenizers=(same, more)))
    wide = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=12, n_layer=1, n_head=3, bos_token_id=1, eos_token_id=None)).double()
    assert model.generate(**told, do_sample=False, custom_generate=route_to(wide, tokenizers=(same, same))).shape == (1, 7)


@pytest.mark.parametrize("ids", [[3, 95, 96, 97], [3, 4]], ids=["in the prompt", "to come"])
@pytest.mark.parametrize("told", [True, False], ids=["tokenizers", "configs"])
def test_a_token_that_one_of_them_cannot_look_up_is_refused_at_the_start(ids, told):
    base, large = zoo.build("llama").model, zoo.build("llama").model
    size = large.config.vocab_size
    large.resize_token_embeddings(60)
    large.config.vocab_size = size
    model = get_token_model(base, R2RConfig(threshold=0.0)).eval()

    class Tokenizer:
        def get_vocab(self):
            return {str(i): i for i in range(size)}

    begun = []
    base.register_forward_pre_hook(lambda *_: begun.append(True))
    with pytest.raises(UnsupportedError, match=f"tables of {size} and 60 embeddings for ids up to {size - 1}"):
        door = route_to(large, tokenizers=(Tokenizer(), Tokenizer()) if told else None)
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False, custom_generate=door)
    assert not begun


@torch.no_grad()
def labels_by_hand(small, large, ids, prompt, verify, horizon):
    """One row of the large model's text: 1 where the small model says another token and the verifier minds, 0 else."""
    out = [-100] * len(ids)
    for i in range(prompt - 1, len(ids) - 1):
        said, own = int(states(small, ids[: i + 1])[1][-1].argmax()), int(ids[i + 1])
        out[i] = int(said != own)
        if said != own and verify is not None:
            ways = []
            for token in (said, own):
                way = [*ids[: i + 1].tolist(), token]
                for _ in range(horizon - 1):
                    way.append(int(states(large, torch.tensor(way))[1][-1].argmax()))
                ways.append(way[i + 1 :])
            out[i] = int(verify(ids[: i + 1], *map(torch.tensor, ways)))
    return out


@pytest.mark.parametrize("verify", [None, lambda so_far, one, other: one[-1].item() != other[-1].item()], ids=["all count", "verified"])
def test_labels_are_those_of_the_loop(verify):
    model, _, large = pair(threshold=0.5)
    prompts, mask = batch((6, 4))
    ids = large.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=6, do_sample=False)
    mask = torch.nn.functional.pad(mask.long(), (0, 6), value=1)
    base = model.get_base_model()
    with torch.no_grad():  # positions from the mask, as `generate` counts them
        small = lambda **given: model(**given, position_ids=positions(given["attention_mask"].bool()))
        got = label_routes(small, large, ids, mask, prompt=6, verify=verify, horizon=4)
    for row, real in enumerate(mask.bool()):
        expected = labels_by_hand(base, large, ids[row][real], int(real.sum()) - 6, verify, 4)
        assert got[row][real].tolist() == expected
        assert (got[row][~real] == -100).all()
    with torch.no_grad():
        assert ((got == 1) <= (label_routes(small, large, ids, mask, prompt=6) == 1)).all()


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_loss_is_that_of_the_loop(weight):
    model, p, _ = pair(positive_weight=weight, logits=9)
    ids, mask = batch((7, 4))
    targets = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(3)).masked_fill(~mask, -100)
    model.train()(input_ids=ids, attention_mask=mask, position_ids=positions(mask), hf_tokens_targets=targets)
    base, total = model.get_base_model(), 0.0
    for row, real in enumerate(mask):
        with torch.no_grad():
            hidden, logits = states(base, ids[row][real])
        for i, label in enumerate(targets[row][real].tolist()):
            c = chance(hidden[i], logits[i], base.transformer.wte.weight, p, 9)
            total -= weight * math.log(c) if label else math.log(1 - c)
    assert aux_loss(model).item() == pytest.approx(total / int(mask.sum()), abs=1e-9)
    with pytest.raises(ConfigError, match="must hold 1, 0 or -100"):
        model(input_ids=ids, hf_tokens_targets=targets[:, 1:])
    with pytest.raises(ConfigError, match="R2R learns from the column hf_tokens_targets alone, got a batch without it"):
        model(input_ids=ids)


def test_training_with_trainer_teaches_the_labels_and_the_adapter_is_saved(tmp_path):
    model, _, large = pair()
    ids, _ = batch((16, 16, 16, 16))
    targets = label_routes(model, large, ids)
    data = [{"input_ids": row, "labels": row, "hf_tokens_targets": target} for row, target in zip(ids, targets, strict=True)]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=80, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model=model, args=args, train_dataset=data).train()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {n for n in before if "hf_tokens" in n}
    model.eval()(ids)
    verdict = model.get_base_model().transformer.h[-1].hf_tokens.surgery.model.verdict
    known = targets >= 0
    assert (verdict[known] == targets[known].bool()).float().mean() > 0.9
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter", gpt2(2)).eval()
    told = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(m.generate(**told, custom_generate=route_to(large)) for m in (model, again)))
