"""Every Python block of the README and of the documentation runs, page by page, with tiny models under the names that stand there."""

import json
import re

import pytest
import torch
import typer
from denoisers import denoiser, stable_diffusion
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from pages import NOTEBOOKS, PAGES, ROOT, blocks_of, cells_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import hf_tokens_cli
from hf_tokens.testing import zoo

NAMED = re.compile(r'"([\w.-]+/[\w.-]+)"')
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENCODER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)

TOWER = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)


def bytewise():
    """A tokenizer of bytes, with a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eos>", "<user>", "<assistant>"]
    raw.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", chat_template=template)


def wordwise():
    """A tokenizer of letters as BERT's has them."""
    words = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)))}
    raw = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def language_model():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300, eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)), bytewise()


def classifier():
    return (ViTForImageClassification(ViTConfig(**TOWER, intermediate_size=64, image_size=16, patch_size=4, num_labels=3)),)


def dit():
    transformer = denoiser("dit", torch.float32)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16)
    return (DiTPipeline(transformer, vae, DDIMScheduler()),)


MODELS = {  # what stands on the Hub under a name
    "HuggingFaceTB/SmolLM2-135M-Instruct": language_model,
    "google/vit-base-patch16-224": classifier,
    "llava-hf/llava-1.5-7b-hf": lambda: (zoo.build("llava").model,),
    "facebook/dinov2-small": lambda: (
        Dinov2Model(Dinov2Config(hidden_size=32, image_size=32, patch_size=4, num_hidden_layers=4, num_attention_heads=4)),
    ),
    "facebook/DiT-XL-2-256": dit,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": lambda: (stable_diffusion(),),
    "sentence-transformers/all-MiniLM-L6-v2": lambda: (BertModel(BertConfig(vocab_size=60, **ENCODER)), wordwise()),
    "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank": lambda: (
        BertForTokenClassification(BertConfig(vocab_size=60, **ENCODER)),
        wordwise(),
    ),
}


CODE = {page: blocks_of(page, "python") for page in PAGES} | {notebook: cells_of(notebook) for notebook in NOTEBOOKS}


@pytest.mark.parametrize("page", [page for page, blocks in CODE.items() if blocks], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in sorted({*NAMED.findall("".join(CODE[page]))} & MODELS.keys()):
        torch.manual_seed(0)
        hub.organizations.setdefault(name.split("/")[0], set()).add("alice")
        for part in MODELS[name]():
            part.push_to_hub(name)
    names = {"__name__": "page"}
    for block in CODE[page]:
        exec(compile(block, str(page), "exec"), names)


def test_a_notebook_is_kept_with_what_it_showed():
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)] and any(cell["outputs"] for cell in cells)
        assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


def commands_of(page):
    return {line.split("#")[0].split()[1] for text in blocks_of(page, "") + blocks_of(page, "bash") for line in text.splitlines()
            if line.startswith("hf-tokens ") and not line.split()[1].startswith("-")}  # fmt: skip


def test_the_commands_on_the_pages_are_there():
    known = typer.main.get_command(hf_tokens_cli.app.app).commands
    assert {command for page in PAGES for command in commands_of(page)} <= known.keys()


def test_every_page_stands_in_the_navigation():
    written = (ROOT / "mkdocs.yml").read_text()
    assert all(str(page.relative_to(ROOT / "docs")) in written for page in PAGES if page.parent != ROOT)
