"""sentence-transformers with a surgery: prompts and a LoRA in an encoder, ColBERT pooling behind a retriever, saved and loaded.

python examples/embed_text.py                                        # tiny random encoders, seconds
python examples/embed_text.py --model sentence-transformers/all-MiniLM-L6-v2 --retriever lightonai/GTE-ModernColBERT-v1

What is true of it:
- `get_token_model` returns a PeftModel, which takes the place of the encoder's model: the encoder then saves the adapter alone (and the id
  of its base), and `SentenceTransformer(folder)` loads it, wherever hf_tokens was imported. Not put there, it is lost when it is saved.
- An adapter runs on `backend="torch"`; sentence-transformers refuses it on others. What `hf_tokens.export(model, folder)` bakes into a
  checkpoint (LoRAs, edits) goes there.
- Fewer vectors for a text are made behind all that makes them, by `TokenPooling`; its folder loads with `trust_remote_code=True`, as any
  module that is not sentence-transformers' own.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hf_tokens
from hf_tokens.sentence_transformers import TokenPooling

TEXTS = [
    "a small cat sat on the warm mat and slept all day",
    "the warm mat",
    "on the day the cat slept all day all the mat sat on a warm small cat and slept",
]


def tiny(folder: Path) -> str:
    """A folder with an encoder of random weights that reads the words above."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*marks, *sorted({word for text in TEXTS for word in text.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {f"{mark.strip('[]').lower()}_token": mark for mark in marks}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    BertModel(BertConfig(vocab_size=len(words), pad_token_id=0, **sizes)).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="sentence encoder, a Hub id or a folder")
    parser.add_argument("--retriever", help="late-interaction retriever, a Hub id or a folder")
    given = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        encoder = SentenceTransformer(given.model or tiny(folder / "encoder"), device="cpu")
        base = encoder.encode(TEXTS)
        stack = [hf_tokens.DeepPromptConfig(tokens=4), LoraConfig(target_modules="all-linear")]
        encoder[0].model = hf_tokens.get_token_model(encoder[0].model, stack)  # from here on it trains with SentenceTransformerTrainer
        vectors = encoder.eval().encode(TEXTS)
        encoder.save(str(folder / "adapted"))
        again = SentenceTransformer(str(folder / "adapted"), device="cpu").encode(TEXTS)
        size = (folder / "adapted" / "adapter_model.safetensors").stat().st_size
        same = np.array_equal(vectors, again)
        print(f"prompts moved a vector by {np.abs(vectors - base).max():.3f}, in {size:,} bytes")

        retriever = MultiVectorEncoder(given.retriever or tiny(folder / "retriever"), device="cpu").eval()
        whole = retriever.encode_document(TEXTS)
        retriever.append(TokenPooling(hf_tokens.ColBERTTokenPoolingConfig(pool_factor=3)))
        short = retriever.encode_document(TEXTS)
        retriever.save(str(folder / "pooled"))
        again = MultiVectorEncoder(str(folder / "pooled"), device="cpu", trust_remote_code=True).eval().encode_document(TEXTS)
        same &= all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(short, again, strict=True))
        print(f"vectors of the texts: {sum(map(len, short))} of {sum(map(len, whole))}")
        print(f"same vectors from the saved folders: {same}")


if __name__ == "__main__":
    main()
