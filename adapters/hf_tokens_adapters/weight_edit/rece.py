"""RECE: erase a concept from the projections that read the prompt, derive what would still bring it back, erase that too, and so on.

Paper:   Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models (Gong et al., ECCV 2024), arXiv:2407.12383
Needs:   an edit: the concepts, told to `hf_tokens.edit`
Maths:   W' = argmin_W sum_i |W c_i - W_0 c_i*|^2 + l_1 sum_j |W p_j - W_0 p_j|^2 + l_2 |W - W_k|^2  for each key and value projection
         c' = argmin_c sum_W |W' c - W_0 c_i|^2 + l |c - r_i|^2 = (l I + sum_W W'^T W')^-1 (sum_W W'^T W_0 c_i + l r_i),  r_i = 0
         the first step erases the concept's tokens c_i towards those of a harmless one, c_i*; each of the epochs behind it erases c' too
         technique "tensor": towards W_0 c_i* less its part along W_k c, both taken for one vector over all tokens
Differs: W_k are the weights of the step before, W_0 those of the start. The authors' code maps anchors and what is kept to where W_k has
         them from the second step on, and they drift: on random tokens and 16 projections what is kept has moved by 42 % of its length
         after three epochs and diverges in ten, by 7 and 10 % here. Each of its later steps erases c' alone, and may bring it back:
         a small painter showed the concept in 42 % of its pictures, behind the first step in 10 %, behind three epochs of that in 39 %, and
         in 22 % where each step erases again what was erased before (`cumulative`).
         Its first step is UCE's, read from a file; here it is this method's own. l is 0.1 (nudity, easy objects) or 0.001 (styles, hard
         objects) there. The concept's k-th token goes to the k-th of the harmless one.
Checked: CharlesGong12/RECE@403a67fd, derived prompts by each regulariser, and one erasure of each technique, in float64:
         largest difference 1.1e-12; later steps differ as said.

>>> from hf_tokens import RECEConfig, edit, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/PixArtTransformer2DModel")
>>> model = get_token_model(specimen.model, RECEConfig(epochs=2))
>>> prompts = specimen.inputs["encoder_hidden_states"]
>>> data = {"erase": [specimen.inputs], "anchor": [{**specimen.inputs, "encoder_hidden_states": prompts.flip(0)}]}
>>> sorted(edit(model, data)["default.0"])[0]
'transformer_blocks.0.attn2.to_k.weight'
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import MethodConfig, UnsupportedError, WeightEdit, closest_map, option, register


@dataclass(frozen=True)
class RECEConfig(MethodConfig):
    epochs: int = option(3, ge=0, help="How often what brings the concept back is derived and erased, behind the first erasure.")
    erase: float = option(1.0, ge=0, zero=0.0, help="Weight of the concept's tokens.")
    preserve: float = option(0.1, ge=0, help="Weight of the tokens to preserve (lambda_1).")
    stay: float = option(0.1, gt=0, help="Weight of the distance to the weights before the step (lambda_2).")
    derive: float = option(0.1, gt=0, help="Weight of the regulariser of what is derived (lambda); the smaller, the more is erased.")
    towards: str = option(
        "zero", choices=("zero", "anchor", "concept", "mapped"), help="What is derived stays near this (r), or maps near the concept now."
    )
    technique: str = option("replace", choices=("replace", "tensor"), help="Map to the anchor, or to its part across the concept.")
    cumulative: bool = option(True, was={1: False, 2: False}, help="Each epoch erases what was erased before, too.")
    keep: str = option(
        "anchor", choices=("anchor", "nothing"), was={1: "nothing"}, help="What is preserved where the data has no group `preserve`."
    )


@register("rece", RECEConfig, version=3)
class RECE(WeightEdit):
    site = "context"
    kinds = ("denoiser",)
    groups, maybe = ("erase", "anchor"), ("preserve",)

    def edit(self, weights: dict[str, Tensor], context: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        start = {name: w.double() for name, w in weights.items()}
        tokens = {group: self.shared(read) for group, read in context.items()}
        concept, anchor = tokens["erase"], tokens["anchor"]  # t i
        if len(concept) != len(anchor):
            rule = "The groups `erase` and `anchor` have as many real tokens, the k-th of one going to the k-th of the other"
            raise UnsupportedError(
                f"{rule}, got {len(concept)} and {len(anchor)}. Pad the prompts, or show the same number by their masks."
            )
        kept = tokens.get("preserve", anchor if self.config.keep == "anchor" else concept[:0])
        new, erased, goals = self.erase(start, start, concept, anchor, kept), concept, anchor
        for _ in range(self.config.epochs):
            derived = self.derive(new, start, concept, anchor)
            erased, goals = (torch.cat([erased, derived]), torch.cat([goals, anchor])) if self.config.cumulative else (derived, anchor)
            new = self.erase(new, start, erased, goals, kept)
        return new

    @staticmethod
    def shared(read: dict[str, Tensor]) -> Tensor:
        """The tokens (t i) that all the projections read."""
        first = next(iter(read.values()))
        if not all(rows is first or torch.equal(rows, first) for rows in read.values()):
            rule = "RECE needs projections that all read the same context"
            raise UnsupportedError(f"{rule}, got one that changes from block to block. Choose `layers` that share it, or another model.")
        return first.double()

    def erase(self, now: dict[str, Tensor], start: dict[str, Tensor], concept: Tensor, anchor: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """The weights nearest to `now` that map a concept to its anchor and what is kept to where it was."""
        c, known = self.config, self.config.preserve * kept.T @ kept
        moment, cross, new = c.erase * concept.T @ concept + known, c.erase * anchor.T @ concept + known, {}
        for name, w in now.items():
            new[name] = closest_map(w, start[name], moment, cross, c.stay)
            if c.technique == "tensor":
                along = concept @ w.T  # t o
                share = (along * (anchor @ start[name].T)).sum() / along.square().sum()
                new[name] -= closest_map(torch.zeros_like(w), w, moment, c.erase * share * concept.T @ concept, c.stay)
        return new

    def derive(self, now: dict[str, Tensor], start: dict[str, Tensor], concept: Tensor, anchor: Tensor) -> Tensor:
        """What the weights map closest to where they mapped the concept at the start, (t i)."""
        gram, goal = sum(w.T @ w for w in now.values()), sum(w.T @ (start[name] @ concept.T) for name, w in now.items())
        if self.config.towards == "mapped":
            return torch.linalg.solve((1 + self.config.derive) * gram, goal + self.config.derive * gram @ concept.T).T
        near = {"zero": torch.zeros_like(concept), "anchor": anchor, "concept": concept}[self.config.towards]
        gram.diagonal().add_(self.config.derive)
        return torch.linalg.solve(gram, goal + self.config.derive * near.T).T
