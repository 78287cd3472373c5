"""Which axis of a block's argument runs over its tokens: told by its name and form, whatever sizes are equal by chance."""

import pytest
import torch

from hf_tokens import TokenMap, anatomy, get_token_model
from hf_tokens.model.arguments import cut_tensor, pair_form, token_form
from hf_tokens.model.families import FOREIGN_OF
from hf_tokens.model.signatures import parameters
from hf_tokens.testing import probe_config, zoo
from hf_tokens.tokens.ledger import TokenLedger

# argument, its axes, whether it holds numbers with fractions, and the axis of the tokens; f: features, o: one
ARGUMENTS = (
    ("position_embeddings", "b n f", True, 1),
    ("position_embeddings", "o n f", True, 1),
    ("position_embeddings", "n f", True, 0),
    ("position_embeddings", "s b n f", True, 2),
    ("position_ids", "b n", False, 1),
    ("position_ids", "o n", False, 1),
    ("position_ids", "s b n", False, 2),
    ("position_ids", "n", False, 0),
    ("image_rotary_emb", "n f", True, 0),
    ("image_rotary_emb", "b n o f", True, 1),
    ("rotary_emb", "o n o f", True, 1),
    ("freqs_ci", "n o f", True, 0),
    ("sinusoidal_pos", "o o n f", True, 2),
    ("per_layer_input", "b n f", True, 1),
    ("input_ids", "b n", False, 1),
    ("cross_attention_gate", "b n", True, 1),
    ("audio_token_mask", "b n", False, 1),
    ("temb", "b f", True, None),
    ("temb", "b n f f", True, 1),
    ("embedded_timestep", "b f", True, None),
    ("t_cond", "o f", True, None),
    ("encoder_hidden_states", "b f f", True, None),
    ("state", "b f f", True, None),
    ("text_features", "b f f", True, None),
    ("spatial_shapes", "f f", False, None),
    ("level_start_index", "f", False, None),
    ("relative_distance", "n n", False, "pair"),
    ("relative_pos", "o n n", False, "pair"),
)
SECTIONS = 3
SIZES = [(b, n, f) for b in (1, 2, 3, 5) for n in (1, 2, 3, 5, 8) for f in (1, 2, 3, 5, 8, 40)]  # samples, tokens, features
FAMILIES = "llama gpt2 gpt_neo gemma3 gpt_oss qwen3 mixtral falcon phi bert roberta deberta-v2 modernbert roformer t5 bart".split()
OF_ROWS = """
detr dab-detr table-transformer sam sam3 diffusers/HunyuanVideo15Transformer3DModel diffusers/AceStepTransformer1DModel
diffusers/ChromaTransformer2DModel diffusers/WanTransformer3DModel diffusers/LTX2VideoTransformer3DModel
diffusers/JoyImageEditTransformer3DModel diffusers/Krea2Transformer2DModel
""".split()
ROWS = [(2, 1), (3, 1), (2, 2), (16, 16), (2, 4), (2, 8), (4, 32), (8, 8)]  # of a zoo of width 32, with 4 heads of 8


@pytest.mark.parametrize("name, form, fractions, axis", ARGUMENTS)
def test_equal_sizes_do_not_mislead(name, form, fractions, axis):
    for b, n, f in SIZES:
        sizes = {"b": b, "n": n, "f": f, "o": 1, "s": SECTIONS}
        value = torch.zeros([sizes[letter] for letter in form.split()], dtype=torch.float32 if fractions else torch.long)
        ledger = TokenLedger.open(torch.zeros(b, n, 4), 0, False)
        if axis == "pair":
            assert pair_form(ledger, name, value) is not None, (b, n, f)
            continue
        found = token_form(ledger, name, value)
        emptied = cut_tensor(ledger.move(every(b, n)), name, value, None)
        assert (None if axis is None else axis) == (None if found is None or emptied is value else found.index("n")), (b, n, f)


def every(batch, n):
    return TokenMap.select(torch.ones(batch, n, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_any_size_gives_what_each_row_gives_alone(family):
    specimen = zoo.build(family)
    names = [name for name in specimen.inputs if name in ("input_ids", "decoder_input_ids")]
    get_token_model(specimen.model, probe_config(0.5)).eval()
    for b, n in ROWS:
        ids = torch.randint(5, 60, (b, n), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            whole, alone = (specimen.model(**dict.fromkeys(names, rows)) for rows in (ids, ids[1:2]))
        for a, c in zip(zoo.tensors(whole), zoo.tensors(alone), strict=True):
            if len(a) == b:
                torch.testing.assert_close(a[1:2], c, rtol=1e-3, atol=1e-4, msg=lambda text, b=b, n=n: f"{b} rows of {n}: {text}")


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # by Diffusers, in a model of its own
def test_what_is_foreign_to_a_block_is_an_argument_of_it():
    blocks = {type(block) for family in OF_ROWS for s in anatomy(zoo.build(family).model).streams for block in s.blocks}
    for classes, names, _ in FOREIGN_OF:
        assert any(classes.search(b.__name__) and any(map(names.search, parameters(b))) for b in blocks), classes


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of Mochi's own
@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 4])
def test_a_rotary_table_of_tokens_and_heads_is_none_of_samples_where_all_three_are_as_many(batch):
    specimen = zoo.build("diffusers/MochiTransformer3DModel")
    assert specimen.model.config.num_attention_heads == 4
    inputs = {name: torch.cat([value] * 2)[:batch].clone() for name, value in specimen.inputs.items()}
    inputs["hidden_states"] = torch.randn(batch, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))  # four tokens
    model = get_token_model(specimen.model, probe_config(0.5))
    alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}).sample for i in range(batch)]
    torch.testing.assert_close(model(**inputs).sample, torch.cat(alone))
