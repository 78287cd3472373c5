"""Inside sentence-transformers' encoders: the pooler as one of their modules, and the model with a surgery as another."""

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_tokens import ATCConfig, ColBERTTokenPoolingConfig, ConfigError, Dims, UnsupportedError, get_token_model
from hf_tokens.roles.registry import method_info
from hf_tokens.sentence_transformers import TokenPooling

TEXTS = [" ".join(f"w{i}" for i in range(3, 3 + n)) for n in (14, 5, 1, 9)]
POOLING = ColBERTTokenPoolingConfig(pool_factor=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A retriever of random weights, in the form that sentence-transformers reads."""
    folder = tmp_path_factory.mktemp("retriever")
    words = {f"w{i}": i for i in range(90)} | {"[UNK]": 90, "[CLS]": 91, "[SEP]": 92, "[PAD]": 93, "[MASK]": 94}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 91), ("[SEP]", 92)])
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    BertModel(BertConfig(vocab_size=95, pad_token_id=93, **sizes)).save_pretrained(folder)
    return str(folder)


def encoder_of(folder):
    return MultiVectorEncoder(folder, device="cpu").eval()


def pooled(vectors):
    """What the method makes of the vectors (n d) of one text."""
    n, width = vectors.shape
    every, places = torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None]
    method = method_info(POOLING.method).cls(POOLING, Dims(width, 4, 4, 8, 1, 2, "text", False))
    return method.pool(vectors[None], every, every.float(), places, 0)[0]


def test_an_encoder_that_ends_with_token_pooling_returns_what_the_method_makes_of_each_text(folder):
    encoder = encoder_of(folder)
    whole = encoder.encode_document(TEXTS)
    queries = encoder.encode_query(TEXTS)
    encoder.append(TokenPooling(POOLING))
    short = encoder.encode_document(TEXTS)
    assert [len(vectors) for vectors in short] == [(n + 2) // 3 + 1 for n in (14, 5, 1, 9)]
    torch.testing.assert_close(short, [pooled(vectors) for vectors in whole])
    torch.testing.assert_close(encoder.encode_query(TEXTS), queries, rtol=0, atol=0)


def test_token_pooling_of_one_call_is_that_of_the_module(folder):
    encoder = encoder_of(folder)
    short = encoder.encode_document(TEXTS, token_pooling=TokenPooling(POOLING))
    encoder.append(TokenPooling(POOLING.to_dict()))
    torch.testing.assert_close(short, encoder.encode_document(TEXTS), rtol=0, atol=0)


def test_token_pooling_is_saved_with_the_encoder(folder, tmp_path):
    encoder = encoder_of(folder)
    encoder.append(TokenPooling(POOLING, tasks=["query", "document"]))
    encoder.save(str(tmp_path))
    again = MultiVectorEncoder(str(tmp_path), device="cpu", trust_remote_code=True).eval()
    for encode in ("encode_query", "encode_document"):
        texts = [getattr(one, encode)(TEXTS) for one in (encoder, again)]
        torch.testing.assert_close(texts[0], texts[1], rtol=0, atol=0)


def test_a_factor_of_one_and_no_text_change_nothing(folder):
    encoder = encoder_of(folder)
    whole = encoder.encode_document(TEXTS)
    encoder.append(TokenPooling(ColBERTTokenPoolingConfig(pool_factor=1)))
    torch.testing.assert_close(encoder.encode_document(TEXTS), whole, rtol=0, atol=0)
    assert TokenPooling(POOLING).pool_one(torch.zeros(0, 32)).shape == (0, 32)


def test_training_reaches_the_model_through_token_pooling(folder):
    encoder = encoder_of(folder)
    encoder.append(TokenPooling(POOLING))
    features = encoder.tokenize(TEXTS)
    encoder(features)["token_embeddings"].square().sum().backward()
    assert all(p.grad is not None for name, p in encoder[0].model.named_parameters() if "layer.0.attention" in name)


def test_in_the_model_itself_the_pooler_names_the_module(folder):
    encoder = encoder_of(folder)
    get_token_model(encoder[0].model, POOLING)
    with pytest.raises(UnsupportedError, match="`hf_tokens.sentence_transformers.TokenPooling`"):
        encoder.encode_document(TEXTS)


@pytest.mark.parametrize("method", ["simpool", "arc-encoder", "atc", ATCConfig()])
def test_methods_that_need_a_model_are_refused(method):
    with pytest.raises(UnsupportedError, match="TokenPooling takes a pooler at the site `output`"):
        TokenPooling(method)


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'colbert-token-pooling'"):
        TokenPooling("colbert-token-poolin")
