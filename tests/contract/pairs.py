"""The pairs of all methods that there are here with the architectures of the contract, and what the tests need to make them."""

from hf_tokens import list_methods
from hf_tokens.testing import probe
from hf_tokens.testing.contract.pairs import ContractPair, pairs_of, simplest

METHODS = {info.name: info for info in list_methods()}
PUBLISHED = [name for name, info in METHODS.items() if info.cls.__module__ != probe.__name__]  # the probes are no paper's
PLACED = [name for name, info in METHODS.items() if info.cls.placed]  # the others are applied by doors of their own
PAIRS = pairs_of(METHODS)
PICTURES = ("transprune", "fourier-vlm", "crosslmm", "videollm-mod")


def one_of_each_role():
    """A method of each role on an architecture that takes it, of few streams: for what is too slow to do with each pair."""
    return simplest(PAIRS, lambda pair: pair.info.role)


def with_pictures():
    """The same, and some that read pictures, on a model of both."""
    return [*one_of_each_role(), *(ContractPair(method, "llava") for method in PICTURES)]
