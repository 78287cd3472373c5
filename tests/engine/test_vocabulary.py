"""Transplants of a vocabulary: which tokens are shared, what a model is told, how it is undone, and what is refused."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hf_tokens import MethodConfig, UnsupportedError, VocabularyEdit, get_token_model, register, transplant
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.tools.vocabulary import shared, surfaces


@dataclass(frozen=True)
class MeanConfig(MethodConfig):
    pass


@pytest.fixture(autouse=True)
def mean():
    @register("test-mean", MeanConfig)
    class Mean(VocabularyEdit):
        """Paper: none, arXiv:0000.00000"""

        def rows(self, anchors: Tensor, donor_rows: Tensor) -> Tensor:
            return anchors.mean(dim=0, keepdim=True).expand(len(donor_rows), -1)

    yield
    del METHODS["test-mean"]


def tokenizer(tokens, **special):
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


WORDS = [f"w{i}" for i in range(90)]
OWN = tokenizer(["<p>", "<s>", "</s>", *(f"Ġ{word}" for word in WORDS)], bos_token="<s>", eos_token="</s>", pad_token="<p>")
DONOR = tokenizer(["[P]", "[C]", "[S]", "new", *WORDS[:9], "##s"], cls_token="[C]", sep_token="[S]", pad_token="[P]")
EMBEDDINGS = torch.randn(14, 4)


def test_one_text_has_one_surface_whatever_marks_it():
    gpt2 = tokenizer(["<s>", "Ġthe", "ing", "Ġcaf", "Ã©", "Ċ"], bos_token="<s>")
    llama = tokenizer(["<unk>", "▁the", "ing", "▁caf", "é", "<0x0A>", "▁", "<0x69>"], unk_token="<unk>")
    bert = tokenizer(["[UNK]", "the", "##ing", "caf", "##é"], unk_token="[UNK]")
    words = {b" the", b"ing", b" caf", "é".encode()}
    assert surfaces(gpt2).keys() == words | {b"\n"}
    assert surfaces(llama).keys() == words | {b"\n", b" ", b"i"}
    assert surfaces(bert).keys() == words
    assert surfaces(tokenizer(["a", "b"])) == {b"a": 0, b"b": 1}
    base, donor, roles = shared(gpt2, bert)
    assert sorted(zip(base.tolist(), donor.tolist(), strict=True)) == [(1, 1), (2, 2), (3, 3), (4, 4)] and roles == {}


def test_a_byte_counts_where_no_text_does():
    assert surfaces(tokenizer(["▁", "<0x41>", "A", "<0x42>"]))[b"A"] == 2
    assert surfaces(tokenizer(["▁", "A", "<0x41>"]))[b"A"] == 1


def test_special_tokens_go_by_role():
    assert shared(OWN, DONOR)[2] == {0: 0, 1: 1, 2: 2}
    assert shared(OWN, tokenizer(["</s>", "Ġw1"], eos_token="</s>"))[2] == {0: 2}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert", "gptj", "gemma3_text"])
def test_a_model_gets_a_vocabulary_and_its_own_one_back(family):
    specimen = zoo.build(family)
    model, ids = specimen.model, torch.arange(12)[None]
    before = snapshot(model)
    own = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(input_ids=ids)[0]
    done = transplant(model, OWN, EMBEDDINGS, DONOR, MeanConfig())
    assert done.model is model and (done.shared, done.unseen) == (12, 2)
    rows = model.get_input_embeddings().weight
    old = own[next(name for name, p in model.named_parameters() if p is rows)][0]
    assert torch.equal(rows[4:13], old[3:12]) and torch.equal(rows[:3], old[[0, 1, 2]])
    torch.testing.assert_close(rows[3], old[3:12].mean(dim=0))
    with torch.no_grad():
        out = model(input_ids=ids)[0]
    assert out.shape[-1] == (14 if model.get_output_embeddings() is not None else wanted.shape[-1]) and out.isfinite().all()
    assert model.config.vocab_size == 14 and model.get_input_embeddings().num_embeddings == 14
    assert done.undo() is model
    assert not difference(before, snapshot(model))
    assert all(p is own[name][0] and p.data_ptr() == own[name][1] for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids)[0], wanted)


def test_the_ids_in_the_config_follow():
    model = zoo.build("llama").model
    model.config.eos_token_id = model.generation_config.eos_token_id = [2, 7, 98]
    model.config.pad_token_id = 0
    done = transplant(model, OWN, EMBEDDINGS, DONOR, "test-mean")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, [2, 8], 0)
    assert model.generation_config.eos_token_id == [2, 8]
    done.undo()
    assert model.generation_config.eos_token_id == [2, 7, 98]


def test_adapters_come_behind_a_transplant():
    specimen = zoo.build("llama")
    transplant(specimen.model, OWN, EMBEDDINGS, DONOR, MeanConfig())
    model = get_token_model(specimen.model, ["probe-insert", LoraConfig(r=2, target_modules=["q_proj"])])
    ids = torch.arange(12)[None]
    assert model(input_ids=ids, labels=ids).logits.shape[-1] == 14


def test_a_donor_s_head_makes_the_head():
    model = zoo.build("llama").model
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    transplant(model, OWN, EMBEDDINGS, DONOR, "omp-transplant", donor_head=torch.randn(14, 6))
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (14, 32)


def test_refusals():
    llama = zoo.build("llama").model
    with pytest.raises(UnsupportedError, match="needs a method of the role VocabularyEdit, got 'atc'. See"):
        transplant(llama, OWN, EMBEDDINGS, DONOR, "atc")
    with pytest.raises(UnsupportedError, match="A method of the role VocabularyEdit is no adapter, got 'omp-transplant'. Its card says"):
        get_token_model(llama, "omp-transplant")
    with pytest.raises(UnsupportedError, match="a row for each token of the donor's tokenizer, .14 e., got .9, 4.. Pass the matrix"):
        transplant(llama, OWN, EMBEDDINGS[:9], DONOR, MeanConfig())
    with pytest.raises(UnsupportedError, match="A transplant needs tokens that both vocabularies have, got none of 2. Pass"):
        transplant(llama, OWN, EMBEDDINGS, tokenizer(["x", "y"]), MeanConfig())
    with pytest.raises(UnsupportedError, match="has a row for each token of its tokenizer, got token 152 for 99 rows. Pass"):
        large = tokenizer(["<s>", *(f"Ġx{i}" for i in range(150)), "Ġw0", "Ġw1"])
        transplant(llama, large, EMBEDDINGS, DONOR, MeanConfig())
    gpt2 = zoo.build("gpt2").model
    with pytest.raises(UnsupportedError, match="a head that is not tied to the embeddings, got the tied head of GPT2LMHeadModel"):
        transplant(gpt2, OWN, EMBEDDINGS, DONOR, MeanConfig(), donor_head=EMBEDDINGS)
    for family in ("t5", "llava"):
        with pytest.raises(UnsupportedError, match="a model of text alone, with one stack of blocks, got"):
            transplant(zoo.build(family).model, OWN, EMBEDDINGS, DONOR, MeanConfig())
    with pytest.raises(UnsupportedError, match="given to a Transformers model itself, got PeftModel. Transplant first"):
        tuned = get_peft_model(zoo.build("gpt2").model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        transplant(tuned, OWN, EMBEDDINGS, DONOR, MeanConfig())
    llama.model.other = nn.Embedding(99, 3)
    with pytest.raises(UnsupportedError, match="all that has a row for each token, got another Embedding in LlamaForCausalLM. Choose"):
        transplant(llama, OWN, EMBEDDINGS, DONOR, MeanConfig())
