"""Drop image tokens inside the language model of a vision-language model while it generates.

python examples/prune_vlm.py                                         # a tiny random LLaVA
python examples/prune_vlm.py --model llava-hf/llava-1.5-7b-hf
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText

import hf_tokens
from hf_tokens.testing import zoo


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="vision-language model, a Hub id or a folder")
    given = parser.parse_args()
    torch.manual_seed(0)

    if given.model is None:
        tiny = zoo.build("llava")
        model, inputs = tiny.model, {"input_ids": tiny.inputs["input_ids"], "pixel_values": tiny.inputs["pixel_values"]}
    else:
        model = AutoModelForImageTextToText.from_pretrained(given.model)
        size, tokens = model.config.vision_config.image_size, model.config.image_seq_length
        ids = torch.tensor([[1, *[model.config.image_token_id] * tokens, *range(100, 120)]])
        inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    whole = hf_tokens.measure(model, **inputs)

    model = hf_tokens.get_token_model(model, hf_tokens.TransPruneConfig()).eval()
    pruned = hf_tokens.measure(model, **inputs)
    text = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(
        f"generated {tuple(text.shape)}; tokens computed {pruned.tokens} of {whole.tokens}, KV bytes {pruned.kv_bytes} of {whole.kv_bytes}"
    )


if __name__ == "__main__":
    main()
