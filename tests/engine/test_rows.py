"""A row of a padded batch is that row alone, as its tokens are decoded: in families whose attention reads its cache in a way of its own."""

import pytest
import torch
from held import ASKED, LENGTH, STEPS, ask, decoded, texts
from tolerances import all_close, close

from hf_tokens import (
    D2OConfig,
    DeepPromptConfig,
    DrLLMConfig,
    DynamicTokenPoolingConfig,
    FTPConfig,
    KIVIConfig,
    LandmarkAttentionConfig,
    MiKVConfig,
    MiniCacheConfig,
    PrefixKVConfig,
    RazorAttentionConfig,
    SelectionPConfig,
    SqueezeAttentionConfig,
    UnsupportedError,
    get_token_model,
)
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.parameters import stir

STRONG = {
    "prefixkv": PrefixKVConfig(budget=0.5, distance=2),
    "squeezeattention": SqueezeAttentionConfig(budget=0.5, policy="heavy_hitters"),
    "squeezeattention window": SqueezeAttentionConfig(budget=0.5, policy="window"),
    "razorattention": RazorAttentionConfig(heads=(1,), sinks=1, compression=3),
    "d2o": D2OConfig(budget=0.5, spare=False),
    "minicache": MiniCacheConfig(gamma=0.3),
    "mikv": MiKVConfig(importance=0.3, bits=8),
    "kivi": KIVIConfig(group=2, residual=2),
    "ftp": FTPConfig(sparsity=0.3, strict=True),
    "ftp static": FTPConfig(sparsity=0.5, router="static"),
    "selection-p": SelectionPConfig(keep=0.5),
    "deep-prompt": DeepPromptConfig(tokens=2),
}
FAMILIES = {
    "doge": "the mask is made of the cached values of all heads",
    "moshi": "a causal mask over a cache that slides",
    "higgs_audio_v2": "a mask that says which tokens are sounds",
    "evolla": "a mask of the text for another attention",
    "gemma3_text": "a sliding window",
    "hrm_text": "stacks that run several times, with other slots each time",
}
BY_HEAD = "What the heads of an attention are to a cache"
REFUSED = {
    **{("doge", name): BY_HEAD for name in ("squeezeattention", "razorattention", "d2o")},
    **{("higgs_audio_v2", name): "needs a causal stream of kind text" for name in ("ftp", "ftp static", "selection-p")},
    **{("hrm_text", name): "needs blocks (with one slot of the cache each|that store their keys in a slot)" for name in STRONG},
}


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_padded_batch_is_that_row_alone(family, name):
    rule = REFUSED.get((family, name))
    if rule is not None:
        with pytest.raises(UnsupportedError, match=rule):
            decoded(get_token_model(zoo.build(family).model, STRONG[name]).eval())
        return
    model = get_token_model(zoo.build(family).model, STRONG[name]).eval()
    together, _ = decoded(model)
    for row in range(2):
        close(together[row : row + 1], decoded(model, slice(row, row + 1))[0], f"{family} {name} {row}")


UNMASKED = {
    DynamicTokenPoolingConfig(layers=(1, 2)): (
        *("aimv2_text_model", "clip_text_model", "clipseg_text_model", "colpali", "fsmt", "git", "llama", "paligemma"),
    ),
    DrLLMConfig(threshold=0.5): ("colpali", "git", "llama", "paligemma"),
}


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method, families in UNMASKED.items() for family in families],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_where_the_model_gives_no_mask_a_token_sees_what_its_attention_lets_it_see(method, family):
    specimen = zoo.build(family)
    torch.manual_seed(0)
    stir(get_token_model(specimen.model, method).eval())
    together = specimen.run()
    for row in range(2):
        alone = specimen.run(**{name: value[row : row + 1] for name, value in specimen.inputs.items()})
        all_close([t[row : row + 1] for t in together], alone, f"{family} {row}")


def test_a_block_that_changes_a_second_sequence_runs_for_all_samples_or_for_none():
    specimen = zoo.build("pegasus_x")
    base, model = specimen.run(), get_token_model(specimen.model, DrLLMConfig(stream="encoder")).eval()
    skips, runs = [1, 0, 1, 1], [1, 1, 1, 1]
    all_close(zoo.tensors(model(**specimen.inputs, hf_tokens_targets=torch.tensor([runs, runs]))), base)
    with pytest.raises(UnsupportedError, match="changes a second sequence must run for all samples of the batch or for none"):
        model(**specimen.inputs, hf_tokens_targets=torch.tensor([runs, skips]))


def test_what_is_given_no_sound_is_the_base_at_zero_strength():
    """A mask of its own tokens tells of no padding: what is no sound is there all the same."""
    base, model = zoo.build("higgs_audio_v2").model, get_token_model(zoo.build("higgs_audio_v2").model, PrefixKVConfig(budget=1.0)).eval()
    close(decoded(model, slice(0, 1))[0], decoded(base, slice(0, 1))[0])


CHATS = {name: config for name, config in STRONG.items() if name != "ftp static"}
UNTURNED = {("landmark", "gpt2"), ("streaming-llm turned", "gpt2"), ("expected-attention", "gpt2")}  # it turns no keys
CHATS["landmark"] = LandmarkAttentionConfig(block=4, local=4, retrieve=1)


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in CHATS for family in ("llama", "gpt2") if (name, family) not in UNTURNED]
)
def test_padding_between_the_turns_of_a_chat_is_not_there(name, family):
    """A batch of chats is padded behind the shorter answers: entries, their places and their numbers are those of the row alone."""
    model = get_token_model(zoo.build(family).model, CHATS[name]).eval()
    context, _, (question, answer) = texts()
    turns, caches, said = [context, question, *answer.split(1, dim=1)[:STEPS]], [None, None], []
    real = [torch.ones_like(turn[1:]) for turn in turns]
    gaps = [torch.tensor([[1] * 6 + [0] * 4 + [1] * (LENGTH - 6)]), torch.tensor([[0] * 2 + [1] * ASKED]), *real[2:]]
    for i, turn in enumerate(turns):
        padded = torch.zeros_like(gaps[i])
        padded[gaps[i] == 1] = turn[1]
        for which, (ids, masks) in enumerate(((padded, gaps), (turn[1:], real))):
            out = ask(model, ids, torch.cat(masks[: i + 1], dim=1), caches[which])
            caches[which] = out.past_key_values
            said.append(out.logits[:, -1])
        close(said[-2], said[-1], f"turn {i}")
