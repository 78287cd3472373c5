"""What is held in another form is read as that form says, whatever happens to the cache; an entry of several tokens counts as several."""

import copy

import pytest
import torch
from hf_tokens_kernels import picks
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Operations
from tolerances import close
from transformers import DynamicCache

from hf_tokens import (
    CacheCompressor,
    ConfigError,
    KIVIConfig,
    MethodConfig,
    MiKVConfig,
    Polar,
    Quantized,
    RazorAttentionConfig,
    SqueezeAttentionConfig,
    StreamingLLMConfig,
    UnsupportedError,
    get_token_model,
    measure,
    option,
    register,
)
from hf_tokens.engine.tap import AttentionTap
from hf_tokens.kv.formats import GroupTable, Plain, QuantizedTokens
from hf_tokens.kv.layer import TokenCacheLayer
from hf_tokens.kv.states import KVStates
from hf_tokens.kv.storage import Part
from hf_tokens.model.arguments import realign
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import CACHE, zoo
from hf_tokens.tokens.entries import Arrival, Stored
from hf_tokens.tokens.ledger import TokenLedger

B, K, E = 2, 3, 6
FORM = Quantized(bits=3, width=E, group=4)
ALONG = QuantizedTokens(bits=3, width=E, group=2)


def states(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, K, n, E, generator=g), torch.randn(B, K, n, E, generator=g)


def arrive(layer, n, seed):
    k, v = states(n, seed)
    rows = len(layer.origins) if layer.origins is not None else B
    origins = torch.arange(layer.seen, layer.seen + n).expand(rows, n)
    layer.expect(Arrival(origins, None, None, layer.seen + n))
    return layer.update(k[:1].expand(rows, -1, -1, -1), v[:1].expand(rows, -1, -1, -1))


def through(form, x):
    return form.unpack(*form.pack(x.reshape(-1, E))).view_as(x)


def rounded(form, x, where):
    """Keys or values (b k n e), those of `where` as they come back."""
    if form == FORM:
        return torch.where(where[..., None], through(form, x), x)
    out, table = x.clone(), GroupTable(x, E)
    out[where] = form.unpack(*form.pack(x[where], where, table), table)
    return out


class Twin:
    """A layer with packed parts beside one that holds the same in full: what was packed is rounded there."""

    def __init__(self, keys=FORM):
        self.packed, self.full = TokenCacheLayer(), TokenCacheLayer()
        self.keys = keys

    def both(self, change):
        for layer in (self.packed, self.full):
            change(layer)

    def hold(self, seed, early=False):
        """Round keys, and unless `early` the values too, of half of the entries."""
        where = torch.rand(self.full.keys.shape[:3], generator=torch.Generator().manual_seed(seed)) < 0.5
        books = self.full.record.entries
        done, all_done = (books.get(name, torch.zeros_like(where)).bool() for name in ("keys done", "done"))
        filled = torch.ones_like(where) if self.full.filled is None else self.full.filled
        where = where & (filled if filled.dim() == 3 else filled[:, None]) & ~(all_done & early)
        self.packed.hold(where, self.keys, Plain() if early else FORM)
        values = self.full.values if early else rounded(FORM, self.full.values, where & ~all_done)
        self.full.rewrite(rounded(self.keys, self.full.keys, where & ~done), values, None)
        for layer in (self.packed, self.full):
            layer.record.entries["keys done"] = done | where
            layer.record.entries["done"] = all_done | (where & (not early))

    def check(self):
        a, b = self.packed, self.full
        there = torch.ones(a.keys.shape[:3], dtype=torch.bool)
        if a.filled is not None:
            assert torch.equal(a.filled, b.filled)
            there &= a.filled if a.filled.dim() == 3 else a.filled[:, None]
        assert torch.equal(a.origins, b.origins) and a.length == b.length == a.keys.shape[2]
        close(a.keys[there], b.keys[there], "keys")
        close(a.values[there], b.values[there], "values")
        for name, value in a.record.entries.items():
            assert torch.equal(value, b.record.entries[name])
        self.check_tables()
        self.check_codes()

    def check_codes(self):
        """Codes lie channel by channel, whatever became of them: an attention reads rows of cells."""
        both = ((form, states[0]) for part in self.packed.kv.parts or () for form, states in zip(part.forms, part.packed, strict=True))
        assert all(codes.stride(0) == 1 for form, codes in both if form != Plain() and len(codes))

    def check_tables(self):
        """No scales are held of groups of which no entry is left."""
        grouped = [part for part in self.packed.kv.parts or () if part.tables[0] is not None and part.count]
        numbers = [part.packed[0][1][part.cells[part.where]] for part in grouped]
        if grouped:
            assert len({id(part.tables[0]) for part in grouped}) == 1
            assert torch.cat(numbers).unique().tolist() == list(range(len(grouped[0].tables[0].scale)))


def keep(layer, seed, per_head):
    g, n, rows = torch.Generator().manual_seed(seed), layer.length, len(layer.origins)
    lead = (rows, K) if per_head or layer.origins.dim() == 3 else (rows,)
    index = torch.rand(*lead, n, generator=g).argsort(dim=-1)[..., : max(1, n - 2)].sort(dim=-1).values
    filled = torch.rand(*lead, index.shape[-1], generator=g) < 0.8
    layer.keep(index, filled | (torch.arange(index.shape[-1]) == 0))


STEPS = {
    "arrive": lambda twin, seed: twin.both(lambda layer: arrive(layer, 1 + seed % 3, seed)),
    "hold": lambda twin, seed: twin.hold(seed),
    "hold keys": lambda twin, seed: twin.hold(seed, early=True),
    "keep": lambda twin, seed: twin.both(lambda layer: keep(layer, seed, False)),
    "keep per head": lambda twin, seed: twin.both(lambda layer: keep(layer, seed, True)),
    "crop": lambda twin, seed: twin.both(lambda layer: layer.crop(-(seed % 2))),
    "reorder": lambda twin, seed: twin.both(lambda layer: layer.reorder_cache(torch.arange(len(layer.origins)).flip(0))),
    "repeat": lambda twin, seed: twin.both(lambda layer: len(layer.origins) < 5 and layer.batch_repeat_interleave(2)),
    "select": lambda twin, seed: twin.both(lambda layer: layer.batch_select_indices(torch.tensor([0, len(layer.origins) - 1]))),
    "offload": lambda twin, seed: twin.both(lambda layer: (layer.offload(), layer.prefetch())),
    "copy": lambda twin, seed: setattr(twin, "packed", copy.deepcopy(twin.packed)),
}


@pytest.mark.parametrize("keys", [FORM, ALONG], ids=["by token", "by channel"])
@given(steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_packed_layer_is_the_layer_of_what_it_packed(keys, steps):
    twin = Twin(keys)
    STEPS["arrive"](twin, 5)
    STEPS["hold"](twin, 1)
    for name, seed in steps:
        if twin.full.length:
            STEPS[name](twin, seed)
            twin.packed.release()
        twin.check()


def test_a_scale_is_taken_out_again_and_follows_the_rows():
    layer = TokenCacheLayer()
    arrive(layer, 5, 0)
    keys, scale = layer.keys.clone(), 1 + torch.rand(B, K, 1, E)
    layer.hold(torch.ones(B, K, 5, dtype=torch.bool), Quantized(8, E, E), Plain(), scale)
    close(layer.keys, through(Quantized(8, E, E), keys * scale) / scale)
    before = layer.keys
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, before.flip(0))
    arrive(layer, 2, 1)
    layer.release()
    new = layer.keys[:, :, 5:].clone()
    layer.hold(torch.ones(B, K, 7, dtype=torch.bool), Quantized(8, E, E), Plain(), torch.ones_like(scale))
    close(layer.keys[:, :, 5:], through(Quantized(8, E, E), new * scale.flip(0)) / scale.flip(0))
    assert torch.equal(layer.keys[:, :, :5], before.flip(0))


@pytest.mark.parametrize("early", [True, False], ids=["keys alone", "keys and values"])
def test_an_attention_reads_what_is_packed_as_it_lies(early, monkeypatch):
    twin = Twin(ALONG)
    twin.both(lambda layer: arrive(layer, 9, 0))
    twin.hold(1, early)
    q = torch.randn(B, 2 * K, 1, E, generator=torch.Generator().manual_seed(2))
    want = torch.nn.functional.scaled_dot_product_attention(q, twin.full.keys, twin.full.values, scale=0.5, enable_gqa=True)
    monkeypatch.setattr(Part, "read", None)
    monkeypatch.setattr(Part, "of", None)
    got, _ = twin.packed.attend(q, None, False, scaling=0.5, softcap=None)
    close(got, want)


@pytest.mark.parametrize("forms", [(FORM, FORM), (ALONG, FORM)], ids=["by rows", "along the cells"])
def test_few_entries_that_change_their_format_leave_the_others_where_they_lie(forms, monkeypatch):
    layer = TokenCacheLayer()
    arrive(layer, 20, 0)
    where = torch.zeros(B, K, 20, dtype=torch.bool)
    layer.hold(where.index_fill(2, torch.arange(6), True), *forms)
    layer.hold(where.index_fill(2, torch.arange(8), True), *forms)  # makes room
    keys = layer.keys
    monkeypatch.setattr(Part, "tight", None)
    layer.hold(where.index_fill(2, torch.arange(9), True), *forms)
    arrive(layer, 1, 1)
    assert torch.equal(layer.keys[:, :, 9:20], keys[:, :, 9:]) and layer.keys.shape[2] == 21
    assert sorted(part.count for part in layer.kv.parts) == [B * K * 9, B * K * 12]


def test_a_row_of_one_value_is_exact():
    rows = torch.full((2, E), 0.7)
    assert torch.equal(through(FORM, rows), rows)


def test_directions_meet_where_they_lie_alike_or_opposite():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1e-4, 1.0]])
    b = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    (low, up), form = Polar(0.6).pack_pair(a, b), Polar(0.6)
    read = [form.unpack(packed[0].tensor, packed[1]) for packed in (low, up)]
    close(read[0][0], a[0])
    close(read[1][0], b[0])
    assert all(x.isfinite().all() for x in read) and torch.equal(read[0][2], a[2])


@pytest.mark.parametrize("count", [1, 2])
def test_entries_that_come_take_the_places_of_as_many_that_have_left(count):
    generator, plain = torch.Generator().manual_seed(0), [(5 + i) * torch.ones(2, 2, 1, 4) for i in range(9)]
    kv, index = KVStates(), torch.stack([torch.randperm(8, generator=generator)[: 8 - count].sort().values for _ in range(2)])
    for states in plain[:8]:
        kv.append(states, states, None)
    for i in range(3):  # the same places leave each time, whatever lies there by then
        before, gone = kv.ordered()[0].clone(), kv.slots.clone() if i else torch.arange(8).expand(2, -1)
        kv.keep(index, None, None, in_place=True)
        new = torch.randn(2, 2, count, 4, generator=generator)
        kv.append(new, new, None)
        held = before.gather(2, index[:, None, :, None].expand(-1, 2, -1, 4))
        assert torch.equal(kv.ordered()[0], torch.cat([held, new], dim=2))
        left = torch.ones(2, 8, dtype=torch.bool).scatter(1, index, False)
        assert torch.equal(kv.slots[:, -count:].sort(dim=1).values, gone[left].view(2, count).sort(dim=1).values)


def test_cells_come_and_go_without_a_copy_of_the_others():
    layer = TokenCacheLayer()
    arrive(layer, 40, 0)
    layer.hold(torch.arange(40).expand(B, K, 40) < 20, FORM, FORM)
    rooms = []
    for i in range(30):
        arrive(layer, 1, i)
        layer.release()
        layer.hold(torch.arange(layer.length).expand(B, K, layer.length) == 20 + i, FORM, FORM)
        rooms.append(tuple(part.packed[0][0].data_ptr() for part in layer.kv.parts))
    assert len(set(rooms)) <= 6
    assert sorted(part.count for part in layer.kv.parts) == [20 * B * K, 50 * B * K]


@pytest.mark.parametrize("keys", [FORM, ALONG], ids=["by token", "by channel"])
def test_the_entry_of_each_head_goes_over_in_place_as_where_a_mask_says_it(keys):
    early = torch.arange(20).expand(B, K, 20) < 10
    layers = [TokenCacheLayer(), TokenCacheLayer()]
    scale = 1 + torch.rand(B, K, 1, E) if keys == FORM else None
    for layer in layers:
        arrive(layer, 20, 0)
        if keys == ALONG:
            layer.hold(early, keys, Plain())
        layer.hold(torch.arange(20).expand(B, K, 20) < 5, keys, FORM, scale)
    order = torch.stack([torch.randperm(5) for _ in range(B * K)]).view(B, K, 5) + 5
    for step in range(3):
        place = order[..., step : step + 1]
        layers[0].hold(torch.zeros(B, K, layers[0].length, dtype=torch.bool).scatter(-1, place, True), keys, FORM)
        assert layers[1].kv.convert_each(place, (keys, FORM))
        for layer in layers:
            arrive(layer, 1, step)
            layer.release()
        assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
        for one, other in zip(*(layer.kv.parts for layer in layers), strict=True):
            assert torch.equal(one.cells, other.cells) and torch.equal(one.lengths, other.lengths) and one.count == other.count


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (KIVIConfig(group=4, residual=8), 6),
        (MiKVConfig(importance=0.1, bits=2), 6),
        (StreamingLLMConfig(budget=0.25, shift=False), 1.6),
        (SqueezeAttentionConfig(budget=0.25, policy="window"), 1.5),
    ],
    ids=["kivi", "mikv", "streaming-llm", "squeezeattention"],
)
def test_a_generated_token_of_a_compressed_cache_takes_few_operations(config, most):
    """Each costs more than what it computes: no more than so many times as many run as in the plain model."""
    ids, counts = torch.randint(5, 60, (1, 150), generator=torch.Generator().manual_seed(0)), []
    for made in (lambda base: base, lambda base: get_token_model(base, config)):
        model, steps = made(zoo.build("llama").model).eval(), []
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            for _ in range(9):
                with Operations() as operations:
                    model(input_ids=ids[:, :1], **{CACHE: cache}, use_cache=True)
                steps.append(operations.count)
        counts.append(sorted(steps)[4])
    assert counts[1] <= most * counts[0]


def read_by(model, ids, mask, monkeypatch, itself):
    """Logits of a generation, and the operations that ran."""
    if not itself:
        monkeypatch.setattr(AttentionTap, "reads_itself", lambda self, *args: False)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), picks() as picked:
        out = model.generate(ids, attention_mask=mask, **given)
    monkeypatch.undo()
    return torch.stack(out.logits), {choice.operation for choice in picked}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    ("config", "operations"),
    [
        (MiKVConfig(importance=0.3, bits=4), {"packed_attention", "ragged_attention"}),
        (MiKVConfig(importance=0.3, high_bits=8), {"packed_attention", "ragged_attention"}),
        (KIVIConfig(group=2, residual=4), {"packed_attention", "ragged_attention"}),
        (RazorAttentionConfig(sinks=1, compression=4.0, heads=(0, 3)), {"ragged_attention"}),
    ],
    ids=["few bits", "few and more bits", "keys by channel", "heads of different lengths"],
)
def test_decoding_reads_a_cache_where_it_lies(family, config, operations, monkeypatch):
    specimen = zoo.build(family)
    specimen.model.set_attn_implementation("sdpa")
    model, ids = get_token_model(specimen.model, config).eval(), specimen.inputs["input_ids"]
    for padded in (0, 3):
        mask = torch.ones_like(ids)
        mask[0, :padded] = 0
        ours, ran = read_by(model, ids, mask, monkeypatch, True)
        want, unpacked = read_by(model, ids, mask, monkeypatch, False)
        close(ours, want)
        assert not operations & unpacked and (padded or operations <= ran)


def test_an_attention_that_gets_other_keys_is_refused(monkeypatch):
    base = zoo.build("llama")
    model = get_token_model(base.model, MiKVConfig(importance=0.3)).eval()
    monkeypatch.setattr(AttentionTap, "read_packed", lambda self, call: None)
    with pytest.raises(UnsupportedError, match="must get the keys as the cache returns them in each pass, .* got other ones"):
        model.generate(base.inputs["input_ids"], max_new_tokens=4, min_new_tokens=4)


# -- entries that stand for several tokens ---------------------------------------------------------------------------


@pytest.fixture
def thrice(monkeypatch):
    """A method that lets the first entry of each row count as three."""
    monkeypatch.setitem(METHODS, "thrice", {})

    class ThriceConfig(MethodConfig):
        sharp: float = option(1.0, ge=0, zero=0.0, help="Nothing.")

    @register("thrice", ThriceConfig)
    class Thrice(CacheCompressor):
        def score(self, newer):
            return newer.double()

        def budget(self, length, seen):
            return [length - 1] * self.dims.kv_heads

        def fold(self, keys, values, stays):
            first = stays & (stays.long().cumsum(dim=-1) == 1)
            return keys, values, 1.0 + 2 * first

    return ThriceConfig


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager"), ("mixtral", "sdpa"), ("gemma2", "eager")],
)
def test_an_entry_of_size_three_is_three_entries(thrice, family, backend):
    specimen = zoo.build(family)
    base = specimen.model
    base.set_attn_implementation(backend)
    ids, n = specimen.inputs["input_ids"][:, :5], 5
    cache = base(ids, use_cache=True).past_key_values
    thrice_held = DynamicCache()
    for i, layer in enumerate(cache.layers):  # the newest goes, the first comes three times
        keys, values = (torch.cat([t[:, :, :1], t[:, :, :1], t[:, :, :-1]], dim=2) for t in (layer.keys, layer.values))
        thrice_held.update(keys, values, i)
    where = {"position_ids": torch.full((2, 1), n), "attention_mask": torch.ones(2, n + 2)}
    want = base(ids[:, :1], **{CACHE: thrice_held}, **where).logits
    model = get_token_model(base, thrice()).eval()
    ours = model(ids, use_cache=True).past_key_values
    assert [layer.length for layer in ours.layers] == [n - 1] * len(ours.layers)
    assert ours.layers[0].sizes[0, 0].tolist() == [3.0] + [1.0] * (n - 2)
    close(model(ids[:, :1], **{CACHE: ours}, position_ids=where["position_ids"]).logits, want)


def test_sizes_of_heads_reach_their_queries():
    ledger = TokenLedger.open(torch.zeros(1, 1, E), 2, True, heads=4)
    sizes = torch.tensor([[[2.0, 1.0], [1.0, 5.0]]])
    stored = Stored(torch.tensor([[0, 1]]), entries={"sizes": sizes})
    wanted = torch.nn.functional.pad(sizes.repeat_interleave(2, dim=1).log(), (0, 1))
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    for out in (realign(ledger, "attention_mask", mask, stored), ledger.implied_mask(torch.zeros(1, 1, E), stored)):
        close(out[:, :, 0], wanted)
    mask[..., 0] = False
    out = realign(ledger, "attention_mask", mask, stored)
    assert bool((out[..., 0] < -1e30).all()) and float(out[0, 2, 0, 1]) == pytest.approx(float(wanted[0, 2, 1]))


def test_a_word_asks_for_known_signals(monkeypatch):
    monkeypatch.setitem(METHODS, "curious", {})
    with pytest.raises(ConfigError, match=r"Curious.fold may ask for .*got \['colour'\]"):

        @register("curious", type("CuriousConfig", (MethodConfig,), {}))
        class Curious(CacheCompressor):
            def score(self, newer):
                return newer

            def budget(self, length, seen):
                return length

            def fold(self, colour):
                return None


def test_what_is_freed_by_a_head_is_counted(thrice):
    base = zoo.build("llama")
    model = get_token_model(base.model, thrice())
    assert measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 15 * 16 * 4
