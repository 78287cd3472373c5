"""Tiny models in folders, as a user has them: weights, config, and what reads texts or pictures for them."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 32  # of a picture


def save_llama(folder):
    """A decoder of four blocks, and a tokenizer whose tokens are bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vit(folder):
    """A classifier of two classes with four blocks, and what makes pictures into its inputs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    labels = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    config = ViTConfig(image_size=SIDE, patch_size=8, **sizes, **labels)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_pictures(folder, names=("dark", "light"), each=3):
    """Pictures of noise, in a folder for each name."""
    noise = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder
