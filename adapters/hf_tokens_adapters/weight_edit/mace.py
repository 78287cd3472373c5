"""MACE, its closed form: the words around a concept map to what they mapped to with the concept replaced, so that they tell no more of it.

Paper:   MACE: Mass Concept Erasure in Diffusion Models (Lu et al., CVPR 2024), arXiv:2403.06135
Needs:   an edit: the concepts, told to `hf_tokens.edit`
Maths:   W' = argmin_W sum_i |W f_i - W_0 g_i|^2 + l_1 sum_j |W p_j - W_0 p_j|^2 + l |W - W_0|^2  for each key and value projection
            = (sum_i W_0 g_i f_i^T + l_1 sum_j W_0 p_j p_j^T + l W_0) (sum_i f_i f_i^T + l_1 sum_j p_j p_j^T + l I)^-1
         f_i: a word's embedding beside the concept; g_i: the same word's with the concept replaced; p_j: prior concepts
Differs: only this first part of the paper. Behind it the authors train a LoRA of keys and values for each concept, which takes attention
         off the concept's tokens where Grounded SAM finds it in pictures, and fuse these in closed form. For that an objective would have
         to see rows of the cross-attention with their gradient, which none does here: write this part into the UNet by
         `merge_and_unload()`, save the pipeline, and go on with their `cfr_lora_training.py` and `fuse_lora_close_form.py`.
         Masks say which tokens count: hide those of the concept and of what replaces it. The term l is in the authors' code alone: 0.5 as
         its function has it; its configs have 0 with a prior (celebrities, styles, nudity), 10 to 1000 without (objects). The prior is a
         sum over 30,000 captions there, at l_1 = 1e-4 (nudity 7e-7): with few of your own, give them more weight.
Checked: Shilin-LU/MACE@057e7a6e, `closed_form_refinement` of keys and values in float64, with and without a prior, l of 0, 0.5 and 1000:
         largest difference 1.9e-15; where l = 0 and the words are fewer than their features it inverts what has no inverse,
         and here the nearest of the maps that fit is taken.

>>> from hf_tokens import MACEConfig, edit, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/PixArtTransformer2DModel")
>>> model = get_token_model(specimen.model, MACEConfig(stay=1.0))
>>> prompts = specimen.inputs["encoder_hidden_states"]
>>> data = {"erase": [specimen.inputs], "anchor": [{**specimen.inputs, "encoder_hidden_states": prompts.flip(0)}]}
>>> len(edit(model, data)["default.0"])
8
"""

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import MethodConfig, UnsupportedError, WeightEdit, closest_map, option, register


@dataclass(frozen=True)
class MACEConfig(MethodConfig):
    erase: float = option(1.0, ge=0, zero=0.0, help="Weight of the words around the concept.")
    preserve: float = option(1e-4, ge=0, was={1: 1.0}, help="Weight of the prior concepts (lambda_1).")
    stay: float = option(0.5, ge=0, was={1: 1000.0}, help="Weight of the distance to the weights as they were (authors' code: lamb).")


@register("mace", MACEConfig, version=2)
class MACE(WeightEdit):
    site = "context"
    kinds = ("denoiser",)
    groups, maybe = ("erase", "anchor"), ("preserve",)

    def edit(self, weights: dict[str, Tensor], context: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        known: dict[int, tuple[Tensor, Tensor]] = {}  # projections that read the same tokens share their sums
        for name in weights:
            if id(context["erase"][name]) not in known:
                known[id(context["erase"][name])] = self.sums({group: read[name].double() for group, read in context.items()})
        new = {}
        for name, weight in weights.items():
            w = weight.double()
            new[name] = closest_map(w, w, *known[id(context["erase"][name])], self.config.stay)
        return new

    def sums(self, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of f f^T and of g f^T over the pairs of words, with the prior in both, (i i)."""
        beside, replaced = tokens["erase"], tokens["anchor"]  # t i
        if len(beside) != len(replaced):
            rule = "The groups `erase` and `anchor` have as many real tokens, the k-th of one going to the k-th of the other"
            raise UnsupportedError(f"{rule}, got {len(beside)} and {len(replaced)}. Hide the words of the concept by a mask.")
        prior = tokens.get("preserve", beside[:0])
        known = self.config.preserve * prior.T @ prior
        return self.config.erase * beside.T @ beside + known, self.config.erase * replaced.T @ beside + known
