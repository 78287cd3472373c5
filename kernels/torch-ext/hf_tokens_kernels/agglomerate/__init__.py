"""Agglomerative clustering of a batch of distance matrices."""

from .reference import LINKAGES, agglomerate

__all__ = ["LINKAGES", "agglomerate"]
