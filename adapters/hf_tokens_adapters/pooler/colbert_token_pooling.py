"""Token pooling for late interaction: like vectors of a document become their mean, so that an index stores one in f of them.

Paper:   Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling (Clavié et al., 2024),
         arXiv:2409.14683
Needs:   nothing
Maths:   agglomerative clustering of the n unit vectors by Ward's linkage into n / f groups, the first vector kept as it is, n / f + 1 in
         all;  each group becomes its mean
Differs: Ward's linkage takes the squared Euclidean distances 2 - 2 cos of the unit vectors, where the authors' code takes those of the rows
         of the matrix 1 - cos; groups are means of the vectors as the model returns them, which is the paper's mean where they have length
         one. They stand in `last_hidden_state` in the order of their first member, zeros behind those of a shorter text: a vector is there
         where `vectors.any(-1)`. What the model itself makes of its tokens, such as `pooler_output`, is made of all of them.
Checked: stanford-futuredata/ColBERT@501c29d9, pooled vectors of 30 documents of 17 to 46 tokens in float64, its linkage given the vectors:
         largest difference 2.6e-16; by its own distances, rows of 1 - cos, as many groups, of which 159 of 362 are the same.

>>> import torch
>>> from transformers import BertConfig, BertModel
>>> from hf_tokens import ColBERTTokenPoolingConfig, get_token_model
>>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
>>> model = get_token_model(BertModel(BertConfig(**sizes)), ColBERTTokenPoolingConfig(pool_factor=3)).eval()
>>> model(input_ids=torch.arange(16)[None]).last_hidden_state.shape
torch.Size([1, 6, 32])
"""

from dataclasses import dataclass

from hf_tokens_kernels import cluster
from torch import Tensor

from hf_tokens import MethodConfig, Pooler, TokenMap, option, register


@dataclass(frozen=True)
class ColBERTTokenPoolingConfig(MethodConfig):
    pool_factor: int = option(2, ge=1, zero=1, help="Vectors that become one, on average (paper: pool factor).")
    protected_tokens: int = option(1, ge=0, help="Vectors in front that stay as they are; those of special tokens in front always do.")


@register("colbert-token-pooling", ColBERTTokenPoolingConfig)
class ColBERTTokenPooling(Pooler):
    site = "output"

    def pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor, positions: Tensor, prefix: int) -> Tensor | None:
        if self.config.pool_factor == 1:
            return None
        protected = mask & (positions < max(prefix, self.config.protected_tokens))  # b n
        target = mask.sum(dim=1) // self.config.pool_factor
        groups = TokenMap.pool(cluster(hidden.detach(), target, "ward", valid=mask, protected=protected))
        vectors = groups.mean(hidden, sizes)  # b p d
        if groups.filled is None:
            return vectors
        behind = groups.filled.long().argsort(dim=1, descending=True, stable=True)
        return vectors.gather(1, behind[..., None].expand_as(vectors))
