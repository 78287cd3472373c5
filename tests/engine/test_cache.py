"""TokenCacheLayer beside transformers' own layers: the same while nothing was dropped, honest about what was seen once it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_tokens import DeepPromptConfig, MixtureOfDepthsConfig, PrefixKVConfig, UnsupportedError, anatomy, get_token_model
from hf_tokens.engine.run import Memory
from hf_tokens.kv.adopt import adopt
from hf_tokens.kv.layer import TokenCacheLayer
from hf_tokens.testing import CACHE, probe_config, zoo
from hf_tokens.testing.probe import ProbeDropConfig
from hf_tokens.tokens.entries import Arrival, Stored

B, K, E = 2, 3, 4
chunks = st.lists(st.integers(1, 70), min_size=1, max_size=5)


def states(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, n, E, generator=g), torch.randn(B, K, n, E, generator=g)


def filled(sizes=(7, 1, 5), window=None) -> tuple[TokenCacheLayer, DynamicLayer]:
    """Both layers with the same tokens in them."""
    ours, theirs = TokenCacheLayer(window), DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    for i, n in enumerate(sizes):
        k, v = states(n, i)
        mine, other = ours.update(k.clone(), v.clone()), theirs.update(k, v)
        if window is None:
            assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    return ours, theirs


def two_passes(model, inputs, split):
    """The cache and the last logits of a prompt whose tokens behind `split` come in a second pass; of one more token behind it at 0."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not split:
        ids, mask, split = torch.cat([ids, ids[:, -1:]], dim=1), torch.nn.functional.pad(mask, (0, 1), value=1), ids.shape[1]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    head = {"input_ids": ids[:, :split], "attention_mask": mask[:, :split], "position_ids": places[:, :split]}
    cache = model(**rest, **head, use_cache=True).past_key_values
    tail = {"input_ids": ids[:, split:], "attention_mask": mask, "position_ids": places[:, split:]}
    return cache, model(**tail, **{CACHE: cache}).logits[:, -1]


def padded_llama():
    """Inputs of two rows, the second with five tokens of padding in front, and that row alone."""
    ids = zoo.build("llama").inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[1:, 5:], "attention_mask": mask[1:, 5:]}


def same(ours: TokenCacheLayer, theirs: DynamicLayer) -> None:
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert ours.origins.shape == (len(ours.keys), ours.length)


@given(chunks)
@settings(max_examples=20, deadline=None)
def test_update(sizes):
    same(*filled(sizes))


def test_update_with_gradients():
    ours, (k, v) = TokenCacheLayer(), states(5)
    k.requires_grad_()
    ours.update(k, v)
    keys, _ = ours.update(*states(2, 1))
    keys.sum().backward()
    assert torch.equal(k.grad, torch.ones_like(k))


def test_what_update_returned_is_not_overwritten():
    ours, _ = filled((5,))
    first, _ = ours.update(*states(1, 1))
    copy = first.clone()
    ours.crop(-1)
    ours.update(*states(1, 2))
    assert torch.equal(first[:, :, :5], copy[:, :, :5])


@pytest.mark.parametrize("remove", [0, -1, -4, -6, -13])
def test_crop(remove):
    ours, theirs = filled()
    ours.crop(remove)
    theirs.crop(remove)
    same(ours, theirs)
    k, v = states(2, 9)
    ours.update(k.clone(), v.clone())
    theirs.update(k, v)
    same(ours, theirs)


def test_crop_forward_is_refused():
    with pytest.raises(UnsupportedError, match=r"`crop` takes zero or a negative number, got 3\. Pass -k"):
        filled()[0].crop(3)


@pytest.mark.parametrize(
    ("method", "argument"),
    [("reorder_cache", torch.tensor([1, 1])), ("batch_repeat_interleave", 3), ("batch_select_indices", torch.tensor([1]))],
)
def test_rows_change_places(method, argument):
    ours, theirs = filled()
    getattr(ours, method)(argument)
    getattr(theirs, method)(argument)
    same(ours, theirs)


def test_rows_carry_their_books():
    ours, _ = filled((4,))
    ours.keep(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[True, False], [True, True]]))
    ours.first = torch.tensor([0, 2])
    ours.reorder_cache(torch.tensor([1, 0]))
    assert ours.origins.tolist() == [[2, 3], [0, 1]] and ours.first.tolist() == [2, 0]
    assert ours.filled.tolist() == [[True, True], [True, False]]


def test_reset():
    ours, _ = filled()
    ours.reset()
    assert (ours.get_seq_length(), ours.length, ours.nbytes, ours.is_initialized) == (0, 0, 0, False)
    same(*filled())


def test_keep_frees_memory_and_stays_honest():
    ours, theirs = filled((8,))
    index = torch.tensor([[0, 3, 7], [1, 2, 6]])
    before = ours.nbytes
    ours.keep(index)
    for b in range(B):
        assert torch.equal(ours.keys[b], theirs.keys[b][:, index[b]]) and torch.equal(ours.values[b], theirs.values[b][:, index[b]])
    assert ours.nbytes == before * 3 // 8 and ours.length == 3
    assert ours.get_seq_length() == 8 and ours.get_mask_sizes(1) == (9, 0)
    assert ours.origins.tolist() == index.tolist()


def test_a_shortened_cache_takes_announced_tokens_only():
    ours, _ = filled((8,))
    ours.keep(torch.tensor([[0, 3], [1, 2]]))
    with pytest.raises(UnsupportedError, match="2 entries of 8 tokens and a model without it. Start a new cache"):
        ours.update(*states(1))
    ours.expect(Arrival(torch.tensor([[8], [8]]), None, None, 9))
    keys, _ = ours.update(*states(1, 5))
    assert keys.shape[2] == 3 and ours.get_seq_length() == 9 and ours.origins.tolist() == [[0, 3, 8], [1, 2, 8]]


def test_a_cache_of_as_many_other_tokens_takes_announced_tokens_only():
    ours = TokenCacheLayer()
    ours.expect(Arrival(torch.tensor([[0, 0, 2]] * B), None, torch.tensor([[True, False, False]] * B), 3))
    ours.update(*states(3))
    assert ours.length == ours.seen
    with pytest.raises(UnsupportedError, match="A cache that a surgery changed is read by that surgery only"):
        ours.update(*states(1))


@torch.no_grad()
def test_a_mask_of_the_tokens_seen_is_cut_for_as_many_others():
    """17 tokens come in front of 37, and 17 leave: the padding that the mask hides is among those that left."""
    specimen = zoo.build("llava")
    model = get_token_model(specimen.model, [DeepPromptConfig(tokens=17, stream="text"), {"method": "transprune", "version": 1}])
    bare = {name: value[:1] for name, value in specimen.inputs.items()}
    padded = {**bare, **{name: torch.nn.functional.pad(bare[name], (5, 0)) for name in ("input_ids", "attention_mask")}}
    (cache, one), (_, other) = (two_passes(model, inputs, 0) for inputs in (padded, bare))
    assert cache.layers[1].length == cache.layers[1].seen == 38
    close(one, other)


def test_keep_per_head():
    ours, theirs = filled((6,))
    index = torch.tensor([[[0, 1], [2, 3], [4, 5]], [[0, 5], [1, 4], [2, 2]]])
    ours.keep(index, torch.tensor([True, False]).expand(B, K, 2))
    for b in range(B):
        for k in range(K):
            assert torch.equal(ours.keys[b, k, 0], theirs.keys[b, k, index[b, k, 0]])
    assert torch.equal(ours.origins, index) and ours.filled.shape == (B, K, 2)
    assert ours.nbytes == 2 * B * K * E * 4  # one entry a head
    ours.keep(torch.zeros(B, K, 1, dtype=torch.long))
    assert torch.equal(ours.origins, index[..., :1]) and bool(ours.filled.all())


def test_keeping_twice_keeps_of_the_kept():
    ours, theirs = filled((6,))
    ours.keep(torch.tensor([[1, 3, 5], [0, 2, 4]]), torch.tensor([[True, True, False], [True, True, True]]))
    ours.keep(torch.tensor([[1, 2], [0, 2]]))
    assert ours.origins.tolist() == [[3, 5], [0, 4]] and ours.filled.tolist() == [[True, False], [True, True]]
    assert torch.equal(ours.keys[0], theirs.keys[0][:, [3, 5]])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=12))
@settings(max_examples=30, deadline=None)
def test_what_leaves_is_filled_up_as_if_the_others_closed_up(steps):
    """One to three entries leave each row, or each head, and one comes; some of the rows may have filler."""
    ours, plain, made = TokenCacheLayer(), TokenCacheLayer(), 6
    for layer in (ours, plain):
        layer.update(*states(5))
        layer.expect(Arrival(torch.full((B, 1), 5), None, None, 6))
        layer.update(*states(1, 1))
    for leaving, seed in steps:
        g, n = torch.Generator().manual_seed(seed), ours.length
        if n > leaving + 1:
            lead = (B, K) if seed % 3 == 0 else (B,)
            index = torch.rand(*lead, n, generator=g).argsort(dim=-1)[..., : n - 1 - leaving].sort(dim=-1).values
            there = torch.rand(index.shape, generator=g) < 0.8
            there[..., 0] = True
            filled = there if lead == (B,) and seed % 2 else None
            ours.keep(index, filled)
            plain.kv._buffers = None
            plain.keep(index, filled)
        for layer in (ours, plain):
            layer.expect(Arrival(torch.full((B, 1), made), None, None, made + 1))
            layer.update(*states(1, made))
        made += 1
        there = ours.there[..., None]
        assert torch.equal(ours.keys * there, plain.keys * there) and torch.equal(ours.values * there, plain.values * there)
        assert torch.equal(ours.origins, plain.origins) and torch.equal(ours.there, plain.there)
        if ours.kv.parts is None:
            assert torch.equal(Stored(ours.keys[..., 0], slots=ours.kv.slots).origins, ours.kv.unpack()[0][..., 0])


def test_a_cache_that_keeps_its_length_is_not_copied():
    ours, _ = filled((8, 1))
    room = ours.kv._buffers[0].data_ptr()
    for i in range(40):
        ours.keep(torch.tensor([[j for j in range(9) if j != i % 8]] * B))
        ours.expect(Arrival(torch.full((B, 1), 9 + i), None, None, 10 + i))
        ours.update(*states(1, i))
        assert ours.kv._buffers[0].data_ptr() == room


@pytest.mark.parametrize("remove", [-1, -2, -5])
def test_crop_after_keep_forgets_by_place(remove):
    ours, _ = filled((8,))
    ours.keep(torch.tensor([[0, 3, 7], [1, 2, 4]]))
    ours.crop(remove)
    assert ours.get_seq_length() == 8 + remove
    flags = torch.ones_like(ours.origins, dtype=torch.bool) if ours.filled is None else ours.filled
    left = [origins[there].tolist() for origins, there in zip(ours.origins, flags, strict=True)]
    assert left == [[o for o in row if o < 8 + remove] for row in ([0, 3, 7], [1, 2, 4])]


@given(chunks)
@settings(max_examples=20, deadline=None)
def test_a_sliding_window_holds_what_can_be_seen(sizes):
    window = 8
    ours, theirs = TokenCacheLayer(window), DynamicSlidingWindowLayer(sliding_window=window)
    for i, n in enumerate(sizes):
        k, v = states(n, i)
        seen = sum(sizes[:i])
        ours.expect(Arrival(torch.arange(seen, seen + n).expand(B, n), None, None, seen + n))
        keys, _ = ours.update(k.clone(), v.clone())
        other, _ = theirs.update(k, v)
        assert torch.equal(keys[:, :, -other.shape[2] :], other)
        assert ours.length <= 2 * window
    assert ours.is_sliding and ours.get_seq_length() == theirs.get_seq_length() == sum(sizes)
    assert ours.origins[0].tolist() == list(range(sum(sizes)))[-ours.length :]


def test_offload_and_prefetch():
    ours, theirs = filled()
    ours.device = torch.device("meta")
    ours.prefetch()
    assert ours.keys.is_meta and ours.values.is_meta
    ours, _ = filled()
    ours.offload()
    same(ours, theirs)


def test_adopting_moves_the_states_over():
    cache = DynamicCache()
    k, v = states(5)
    cache.update(k, v, 0)
    assert adopt(cache, 2, None)
    assert [type(layer) for layer in cache.layers] == [TokenCacheLayer] * 3
    assert torch.equal(cache.layers[0].keys, k) and cache.get_seq_length() == 5
    first = cache.layers[0]
    assert adopt(cache, 2, None) and cache.layers[0] is first


@torch.no_grad()
@pytest.mark.parametrize("config", [ProbeDropConfig(), PrefixKVConfig(budget=0.5, distance=2)], ids=["probe-drop", "prefixkv"])
def test_a_padded_row_of_an_adopted_cache_is_that_row_alone(config):
    model, found = get_token_model(zoo.build("llama").model, config), []
    for inputs in padded_llama():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        n = ids.shape[1] - 6
        with model.disable_adapter():
            given = {"attention_mask": mask[:, :n], "position_ids": places[:, :n]}
            cache = model(input_ids=ids[:, :n], use_cache=True, **given).past_key_values
        for part in (slice(n, n + 5), slice(n + 5, n + 6)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": places[:, part]}
            out = model(input_ids=ids[:, part], **{CACHE: cache}, **given)
        found.append(out.logits[-1:])
    close(*found)


@torch.no_grad()
def test_a_row_may_begin_behind_the_first_chunk():
    model = get_token_model(zoo.build("llama").model, ProbeDropConfig())
    batch, alone = padded_llama()
    for split in (4, 8):
        close(two_passes(model, batch, split)[1][1:], two_passes(model, alone, 2)[1])


@torch.no_grad()
@pytest.mark.parametrize("config", [DeepPromptConfig(tokens=2), probe_config(0.5)[0]], ids=["block", "input"])
def test_tokens_in_front_of_a_row_that_has_not_begun_are_refused(config):
    model = get_token_model(zoo.build("llama").model, config)
    batch, alone = padded_llama()
    close(two_passes(model, batch, 8)[1][1:], two_passes(model, alone, 2)[1])
    with pytest.raises(UnsupportedError, match=r"a real token of each row, got only padding in rows \[1\]\. Choose a larger"):
        two_passes(model, batch, 4)


@torch.no_grad()
@pytest.mark.parametrize("config", [DeepPromptConfig(tokens=2), probe_config(0.5)[0]], ids=["block", "input"])
def test_inserted_tokens_come_again_where_a_crop_took_them(config):
    model, inputs = get_token_model(zoo.build("llama").model, config), padded_llama()[0]
    first = model(**inputs, use_cache=True)
    first.past_key_values.crop(-inputs["input_ids"].shape[1])
    close(model(**inputs, **{CACHE: first.past_key_values}).logits, first.logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "moonshine"])
def test_fewer_tokens_than_a_crop_took_find_their_places(family):
    """Rows that keep different tokens have gaps among their entries: those stand for no place beyond what is seen."""
    specimen, ids = zoo.build(family, dtype=torch.float64), torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    model = get_token_model(specimen.model, MixtureOfDepthsConfig(layers=(0, 1, 2, 3), capacity=0.5)).eval()
    for name, parameter in model.named_parameters():
        if "hf_tokens" in name:
            torch.nn.init.normal_(parameter)
    given = {n: v for n, v in specimen.inputs.items() if not n.startswith("decoder")} if specimen.model.config.is_encoder_decoder else {}
    name = "decoder_input_ids" if given else "input_ids"

    def said(cache, *passes):
        out = None
        for tokens in passes:
            out = model(**given, **{name: tokens, CACHE: cache}, use_cache=True)
            cache = out[CACHE] if CACHE in out else out.past_key_values
        return out.logits, cache

    for taken in (1, 4, 7, 11):
        for more in (1, 2):
            _, cache = said(None, ids)
            cache.crop(-taken)
            got, _ = said(cache, 70 - ids[:, :more])
            want, _ = said(None, ids[:, :-taken], 70 - ids[:, :more])
            close(got, want)


@torch.no_grad()
def test_a_prompt_that_was_cropped_is_refused_where_it_was_looked_at_as_a_whole():
    """As assisted decoding does: the tokens that are taken back took part in what was decided."""
    model, inputs = get_token_model(zoo.build("llama").model, PrefixKVConfig(budget=0.5)), padded_llama()[1]
    ids = inputs["input_ids"]
    cache = model(**inputs, use_cache=True).past_key_values
    model(input_ids=ids[:, :1], **{CACHE: cache})
    cache.crop(-1)
    model(input_ids=ids[:, 1:2], **{CACHE: cache})  # a token of generation
    cache = model(**inputs, use_cache=True).past_key_values
    cache.crop(-2)
    with pytest.raises(UnsupportedError, match=r"in one pass, got PrefixKV and a prompt that was cropped\. Take back whole prompts"):
        model(input_ids=ids[:, -2:-1], **{CACHE: cache})


def test_a_static_cache_is_refused(llama_config):
    cache = StaticCache(config=llama_config, max_cache_len=16)
    before = list(cache.layers)
    with pytest.raises(UnsupportedError, match="needs a dynamic cache, got a cache of StaticLayer. Leave out `cache_implementation`"):
        adopt(cache, 1, llama_config)
    assert cache.layers == before


WINDOWED = "afmoe cohere2 gemma2 gemma3 gemma4_text gpt_oss llama4_text mimo_v2_flash mistral modernbert-decoder olmo3".split()


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled by the base"])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_cache_made_without_the_config_is_as_one_made_with_it(family, filled):
    """Windows are the config's, and what is behind them goes, whoever made the layers."""
    specimen = zoo.build(family)
    ids = specimen.inputs["input_ids"]
    ids = torch.cat([ids, ids.flip(1)], dim=1)
    config = anatomy(specimen.model).streams[-1].config
    model, found = get_token_model(specimen.model, PrefixKVConfig(budget=0.6, distance=2)).eval(), []
    own = model(input_ids=ids, use_cache=True).past_key_values
    for cache in (DynamicCache(config=config), DynamicCache()):
        if filled and not found:
            cache = DynamicCache()  # a full window of transformers' has lost what padding and places are read off
            cache.layers += [TokenCacheLayer(layer.window) for layer in own.layers]
        if filled:
            with model.disable_adapter():
                model(input_ids=ids[:, :12], **{CACHE: cache}, use_cache=True)
        out = [model(input_ids=part, **{CACHE: cache}, use_cache=True).logits for part in (ids[:, 12 * filled :], ids[:, :1], ids[:, 3:6])]
        found.append((torch.cat(out, dim=1), [(layer.window, layer.origins) for layer in cache.layers]))
    (given, kept), (told, held) = found
    close(told, given, family)
    assert any(window for window, _ in held) and [window for window, _ in held] == [layer.window for layer in own.layers]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(kept, held, strict=True))


OTHER_LAYERS = {
    "a window that the model has not": ("llama", 4, "DynamicSlidingWindowLayer of 4 tokens in place of DynamicLayer at 0"),
    "another window": ("mistral", 5, r"DynamicSlidingWindowLayer of 5 tokens in place of DynamicSlidingWindowLayer of \d+ tokens at 0"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", OTHER_LAYERS)
def test_a_cache_whose_layers_are_not_the_config_s_is_refused(case):
    family, window, got = OTHER_LAYERS[case]
    specimen, cache = zoo.build(family), DynamicCache()
    cache.layers += [DynamicSlidingWindowLayer(sliding_window=window) for _ in range(4)]
    before = list(cache.layers)
    model = get_token_model(specimen.model, PrefixKVConfig(budget=0.6))
    with pytest.raises(UnsupportedError, match=rf"must be those of the model's config, got {got}\. Pass a `DynamicCache\(config"):
        model(**specimen.inputs, **{CACHE: cache}, use_cache=True)
    assert cache.layers == before


def test_a_full_window_is_refused():
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    cache.layers[0].update(*states(6))
    with pytest.raises(UnsupportedError, match="before its window is full, got 6 tokens. Start a new cache"):
        adopt(cache, 0, None)


@pytest.fixture
def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def test_what_is_remembered_of_a_row_follows_it():
    ours, _ = filled()
    ours.memory = Memory()
    ours.memory.rows["mark"] = torch.tensor([3, 5])
    ours.reorder_cache(torch.tensor([1, 1]))
    assert ours.memory.rows["mark"].tolist() == [5, 5]
    ours.batch_repeat_interleave(2)
    ours.batch_select_indices(torch.tensor([0, 3, 3]))
    assert ours.memory.rows["mark"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("sizes", [(9,), (7, 1, 1)], ids=["as they came", "with room behind them"])
def test_rewriting_leaves_what_no_index_names(sizes):
    """A place that stands for none leaves the first entry to the place that names it."""
    ours, theirs = filled(sizes)
    index = torch.tensor([0, -1, 4, -1]).expand(B, K, 4)
    new = [torch.full((B, K, 4, E), float(i + 1)) for i in range(2)]
    ours.kv.write(index, *new)
    for got, want, x in zip((ours.keys, ours.values), (theirs.keys, theirs.values), new, strict=True):
        want = want.clone()
        want[:, :, [0, 4]] = x[:, :, [0, 2]]
        assert torch.equal(got, want)
