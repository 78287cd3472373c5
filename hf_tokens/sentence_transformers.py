"""Token pooling as a module of sentence-transformers: a document's vectors become fewer behind all that makes them."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.modules.token_pooling import BaseTokenPooling
from torch import Tensor

from .errors import UnsupportedError, explain
from .roles import Dims
from .roles.config import MethodConfig
from .roles.registry import method_config, method_info

SIGNALS_OF_VECTORS = {"hidden", "mask", "sizes", "positions", "prefix"}


class TokenPooling(BaseTokenPooling):
    """A pooler in the place of sentence-transformers' own: the last module of a `MultiVectorEncoder`, or the `token_pooling` of a call.

    In the model itself a pooler would return fewer vectors than the text's mask counts; here the mask becomes that of its vectors. It gets
    them as the modules in front leave them, projected and scaled, and those only that are scored. It is saved with the encoder, which then
    loads with `trust_remote_code=True`.

    Args:
        method: A pooler that reads vectors alone, such as `ColBERTTokenPoolingConfig(pool_factor=3)`, its name or its JSON form.
        tasks: What it pools, "document", "query" or both; a text without a task is a document.

    Raises:
        ConfigError: There is no such method.
        UnsupportedError: The method is no pooler at the site `output`, or it needs more of a model than its vectors.

    >>> from sentence_transformers import MultiVectorEncoder
    >>> from hf_tokens.sentence_transformers import TokenPooling
    >>> encoder = MultiVectorEncoder("lightonai/GTE-ModernColBERT-v1")  # doctest: +SKIP
    >>> encoder.append(TokenPooling("colbert-token-pooling"))  # doctest: +SKIP
    >>> encoder.encode_document(["half of the vectors that this text had"])  # doctest: +SKIP
    """

    config_keys = ["method", "tasks"]

    def __init__(self, method: str | dict[str, Any] | MethodConfig, *, tasks: str | list[str] | None = None):
        super().__init__(tasks=tasks)
        config = method_config(method)
        cls = method_info(config.method, config.version).cls
        if cls.role != "Pooler" or cls.site != "output" or not set(cls.signals) <= SIGNALS_OF_VECTORS:
            rule = "TokenPooling takes a pooler at the site `output` that reads the vectors alone"
            raise UnsupportedError(explain(rule, repr(config.method), "Put that method into the model, or take 'colbert-token-pooling'."))
        self.method = config.to_dict()
        self._config, self._pooler = config, cls

    def pool_one(self, embedding: Tensor, **kwargs: Any) -> Tensor:
        """What a text's vectors (n d) become, (p d)."""
        n, width = embedding.shape
        signals = {
            "hidden": embedding[None],
            "mask": torch.ones(1, n, dtype=torch.bool, device=embedding.device),
            "sizes": torch.ones(1, n, device=embedding.device),
            "positions": torch.arange(n, device=embedding.device)[None],
            "prefix": 0,
        }
        pooler = self._pooler(self._config, Dims(width, 1, 1, width, 0, 1, "text", causal=False))
        vectors = pooler.pool(**{name: signals[name] for name in pooler.signals}) if n else None
        return embedding if vectors is None else vectors[0]
