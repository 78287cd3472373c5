"""OMP transplant: a new token is coded by a few shared tokens in the donor's space; the same code over the model's rows is its row.

Paper:   Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit (Goddard and Fernandes Neto, 2025), arXiv:2506.06607
Needs:   an edit: the donor's rows and tokenizer, told to `hf_tokens.transplant`
Maths:   r = e;  k times: S := S + argmax_j |<r, a_j>|,  x = argmin_x |e - sum_{j in S} x_j a_j|^2,  r = e - sum_{j in S} x_j a_j
         the new row is sum_{j in S} x_j b_j;  a_j and b_j: the donor's and the model's rows of the shared tokens;  shared rows stay
Differs: an atom is picked by its inner product, not its cosine, as in the authors' program. The coefficients that the donor's embeddings
         give serve the embeddings and the head, unless the donor's head is passed. A token stops when nothing of it is left.
         Tokens are shared by their text, a space in front where a word begins, and special ones by their role too.
Checked: arcee-ai/mergekit@a6e40288, `batch_omp` and the rows of its code in float64, k from 4 to 64:
         largest difference 2.4e-15; where nothing of a token is left it goes on, and here the code ends.

>>> import torch
>>> from hf_tokens import OMPTransplant, OMPTransplantConfig
>>> anchors, donor = torch.randn(40, 6), torch.randn(40, 12)
>>> method = OMPTransplant(OMPTransplantConfig(k=3))
>>> new = method.rows(anchors, donor, 2 * donor[:2] - 3 * donor[5])  # 2 tokens that are two others' sum
>>> new.shape
torch.Size([2, 6])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import MethodConfig, VocabularyEdit, option, register

LEFT = 1e-6  # of a token's length: what is less is rounding


@dataclass(frozen=True)
class OMPTransplantConfig(MethodConfig):
    k: int = option(64, ge=1, help="Shared tokens in the code of each new one (paper: k).")


@register("omp-transplant", OMPTransplantConfig)
class OMPTransplant(VocabularyEdit):
    def rows(self, anchors: Tensor, donor_anchors: Tensor, donor_rows: Tensor) -> Tensor:
        chosen, x = self.pursue(donor_anchors, donor_rows, min(self.config.k, len(anchors)))
        return (x[..., None] * anchors[chosen]).sum(dim=1)

    def pursue(self, atoms: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The atoms chosen for each row and their coefficients, (u k) each, by one more column of a QR decomposition a step."""
        u, e = rows.shape
        residual, free = rows.clone(), torch.ones(u, len(atoms), dtype=torch.bool, device=rows.device)
        basis, upper = rows.new_zeros(u, k, e), torch.eye(k, dtype=rows.dtype, device=rows.device).repeat(u, 1, 1)
        chosen, parts = torch.zeros(u, k, dtype=torch.long, device=rows.device), rows.new_zeros(u, k, 1)
        scale = rows.norm(dim=1, keepdim=True)
        for step in range(k):
            score = (residual @ atoms.T).abs().masked_fill(~free, -1)
            best = score.argmax(dim=1, keepdim=True)
            free.scatter_(1, best, False)
            atom = atoms[best[:, 0]]
            before, rest = basis[:, :step], atom
            for _ in range(2):  # a second time against rounding
                rest = rest - (before.mT @ (before @ rest[..., None]))[..., 0]
            length = rest.norm(dim=1, keepdim=True)
            useful = (length > LEFT * atom.norm(dim=1, keepdim=True)) & (residual.norm(dim=1, keepdim=True) > LEFT * scale)
            column = torch.where(useful, rest / length.clamp(min=torch.finfo(rows.dtype).tiny), 0)
            part = (column * residual).sum(dim=1, keepdim=True)
            residual = residual - part * column
            basis[:, step], parts[:, step], chosen[:, step] = column, part, best[:, 0]
            upper[:, :step, step] = torch.where(useful, (before @ atom[..., None])[..., 0], 0)
            upper[:, step, step] = torch.where(useful, length, 1)[:, 0]
        return chosen, torch.linalg.solve_triangular(upper, parts, upper=True)[..., 0]
