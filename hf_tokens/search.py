"""A genetic search for shares: numbers in an interval, one a block, with a mean that is given."""

from __future__ import annotations

import random
from collections.abc import Callable

from .errors import ConfigError, explain

Shares = tuple[float, ...]


def transfer(shares: Shares, draw: random.Random, mutation: float, bounds: tuple[float, float]) -> Shares:
    """Move a random amount from one share to another, within the bounds; the sum stays."""
    low, high = bounds
    moved = list(shares)
    giver, taker = draw.sample(range(len(moved)), 2)
    amount = draw.uniform(0, min(mutation, moved[giver] - low, high - moved[taker]))
    moved[giver], moved[taker] = max(low, moved[giver] - amount), min(high, moved[taker] + amount)
    return tuple(moved)


def blend(one: Shares, other: Shares, draw: random.Random) -> Shares:
    """A child between two parents; the sum stays."""
    weight = draw.random()
    return tuple(min(max(a + weight * (b - a), min(a, b)), max(a, b)) for a, b in zip(one, other, strict=True))


def search_shares(
    fitness: Callable[[Shares], float],
    start: Shares,
    *,
    population: int = 20,
    generations: int = 20,
    mutation: float = 0.2,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Shares:
    """The shares of the lowest fitness that were found, never worse than the start.

    Args:
        fitness: What is to be small, such as the loss on calibration data.
        start: The first candidate, such as equal shares; all keep its mean.
        population: Candidates of a generation; the better half lives on.
        generations: Generations after the first.
        mutation: The most that moves from one share to another at a time.
        bounds: Interval of each share.
        seed: Seed of the search.
    """
    low, high = bounds
    if not start or not low <= min(start) <= max(start) <= high or population < 2:
        came = f"start={start}, bounds={bounds}, population={population}"
        raise ConfigError(explain("A search needs shares within its bounds and two candidates", came, "Change them."))
    start = tuple(map(float, start))
    if len(start) == 1:
        return start
    draw = random.Random(seed)

    def mutated(shares: Shares) -> Shares:
        for _ in range(draw.randint(1, len(start))):
            shares = transfer(shares, draw, mutation, bounds)
        return shares

    known: dict[Shares, float] = {}
    living = [start, *(mutated(start) for _ in range(population - 1))]
    for generation in range(generations + 1):
        known.update({shares: fitness(shares) for shares in living if shares not in known})
        living = sorted(dict.fromkeys(living), key=known.__getitem__)[: max(2, population // 2)]
        if generation < generations:
            living += [mutated(blend(draw.choice(living), draw.choice(living), draw)) for _ in range(population - len(living))]
    return living[0]
