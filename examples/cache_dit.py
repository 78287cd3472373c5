"""Reuse features between the denoising steps of a diffusion transformer: a pipeline goes in, a pipeline comes out.

python examples/cache_dit.py                                         # a tiny random DiT pipeline
python examples/cache_dit.py --model facebook/DiT-XL-2-256 --steps 20
"""

import argparse

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import hf_tokens


def tiny() -> DiTPipeline:
    """A pipeline with random weights."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8, num_embeds_ada_norm=1000
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.2)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a DiT pipeline, a Hub id or a folder")
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()

    pipe = tiny() if given.model is None else DiTPipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: pipe([1], num_inference_steps=given.steps, generator=torch.manual_seed(0), output_type="np").images
    before = draw()

    pipe = hf_tokens.get_token_model(pipe, hf_tokens.ToCaConfig(cycle=3, ratio=0.7))
    during = draw()
    print(f"images {during.shape}, mean change {abs(during - before).mean():.4f}")

    pipe = hf_tokens.unload(pipe)
    print(f"back to the bit: {bool((draw() == before).all())}")


if __name__ == "__main__":
    main()
