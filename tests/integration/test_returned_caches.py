"""A cache that a generation returns is as good as one that was kept, or it is not there."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from tolerances import close

from hf_tokens import DeepPromptConfig, DrLLMConfig, H2OConfig, KIVIConfig, MiKVConfig, RandomConfig, UnsupportedError, get_token_model
from hf_tokens.model import families
from hf_tokens.testing import CACHE, zoo
from hf_tokens.testing.contract.parameters import stir

# whether the cache of the decoder comes back as rows of keys, or not at all, as more is known of it
CASES = {
    "of the encoder": (DeepPromptConfig(tokens=3, stream="encoder"), True),
    "blocks that are skipped": (DrLLMConfig(stream="decoder"), False),
    "tokens in front": (DeepPromptConfig(tokens=3, stream="decoder"), False),
    "entries that go": (H2OConfig(budget=0.5), False),
    "nothing goes yet": (RandomConfig(budget=1.0), True),
    "entries in few bits": (MiKVConfig(importance=0.3), False),
    "groups in few bits": (KIVIConfig(group=2, residual=2), False),
}


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_whisper_returns_a_cache_that_can_be_gone_on_from_or_none(case, beams):
    config, whole = CASES[case]
    specimen = zoo.build("whisper")
    sound, ids = specimen.inputs["input_features"], specimen.inputs["decoder_input_ids"][:, :6]
    model = stir(get_token_model(specimen.model, config)).eval()
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "num_beams": beams}
    given |= {"max_new_tokens": 5, "min_new_tokens": 5, "suppress_tokens": list(range(80, zoo.VOCAB))}
    out = model.generate(input_features=sound, decoder_input_ids=ids, **given)
    bare = model.generate(input_features=sound, decoder_input_ids=ids, **{**given, "return_dict_in_generate": False})
    assert out.sequences[:, 6:].tolist() == bare.tolist()
    assert (out.past_key_values is not None) == whole
    if beams > 1 and whole:
        return  # transformers gives the rows of the first beams, with which nobody can go on
    longer, name = torch.cat([out.sequences, ids], dim=1), {"input_features": sound, **given}
    on = model.generate(decoder_input_ids=longer, **{CACHE: out.past_key_values}, **name)
    new = model.generate(decoder_input_ids=longer, **name)
    close(torch.stack(on.logits), torch.stack(new.logits))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_whisper_tells_when_each_token_was_said_or_the_method_is_refused(case):
    specimen = zoo.build("whisper")
    specimen.model.generation_config.alignment_heads = [[1, 0], [3, 1]]
    model = stir(get_token_model(specimen.model, CASES[case][0])).eval()
    given = {"max_new_tokens": 5, "suppress_tokens": list(range(80, zoo.VOCAB)), "return_token_timestamps": True}
    given |= {"input_features": specimen.inputs["input_features"], "return_dict_in_generate": True}
    if case in ("blocks that are skipped", "tokens in front"):
        with pytest.raises(UnsupportedError, match="blocks that all run once.*Leave out `return_token_timestamps`"):
            model.generate(**given)
    else:
        out = model.generate(**given)
        assert out["token_timestamps"].shape == out["sequences"].shape


# Files of families whose code, outside of an attention, reads what the layers of a cache store, and what we do about it.
READERS = {
    "modeling_dory.py": "refused: its config does not tell of the layers that it adds",
    "modeling_rag.py": families.ROWS_OF_DOCUMENTS,
    "generation_unlimited_ocr.py": "refused: its layers are of a class that keeps no books",
    "modeling_unlimited_ocr.py": "the same",
    "generation_vibevoice.py": families.OWN_CACHES,
    "generation_whisper.py": families.ROWS_OF_CACHE,
}
STORED = re.compile(r"\.layers\[(?!self\.layer_idx)[^\]]*\]\.(keys|values)\b|\bin [^\n(]*(cache|past_key_values)[^\n( ]*\.layers\b")


def test_every_family_whose_own_code_reads_a_cache_is_known():
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/*.py"):
        if file.name.startswith(("modeling", "generation")) and STORED.search(file.read_text()):
            found.add(file.name)
    assert found <= set(READERS)
    assert {name for name in READERS if READERS[name] in (families.ROWS_OF_CACHE, families.ROWS_OF_DOCUMENTS)} <= found
