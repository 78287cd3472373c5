"""Merge tokens inside an image classifier: fewer tokens computed, the same output shapes.

python examples/merge_vit.py                                         # a tiny random ViT
python examples/merge_vit.py --model google/vit-base-patch16-224 --keep-rate 0.7
"""

import argparse

import torch
from transformers import AutoModelForImageClassification

import hf_tokens
from hf_tokens.testing import zoo


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="image classifier, a Hub id or a folder")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    given = parser.parse_args()
    torch.manual_seed(0)

    model = zoo.build("vit").model if given.model is None else AutoModelForImageClassification.from_pretrained(given.model)
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    before, whole = model(pixels).logits, hf_tokens.measure(model, pixel_values=pixels)

    model = hf_tokens.get_token_model(model, hf_tokens.ATCConfig(keep_rate=given.keep_rate)).eval()
    during, merged = model(pixels).logits, hf_tokens.measure(model, pixel_values=pixels)
    print(
        f"logits {tuple(during.shape)}, tokens computed {merged.tokens} of {whole.tokens}, FLOPs {merged.flops / whole.flops:.2f} of before"
    )

    after = model.unload()(pixels).logits
    print(f"back to the bit: {torch.equal(before, after)}")


if __name__ == "__main__":
    main()
