"""Searches over what each block of a stream gets: shares with a mean that is given, by generations; runs of each block, by a tree."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError, explain
from .progress import track

Shares = tuple[float, ...]
Path = tuple[int, ...]


def transfer(shares: Shares, draw: random.Random, mutation: float, bounds: tuple[float, float]) -> Shares:
    """Move a random amount from one share to another, within the bounds; the sum stays."""
    low, high = bounds
    moved = list(shares)
    giver, taker = draw.sample(range(len(moved)), 2)
    amount = draw.uniform(0, min(mutation, moved[giver] - low, high - moved[taker]))
    moved[giver], moved[taker] = max(low, moved[giver] - amount), min(high, moved[taker] + amount)
    return tuple(moved)


def blend(mother: Shares, father: Shares, draw: random.Random) -> Shares:
    """A child between two parents; the sum stays."""
    weight = draw.random()
    return tuple(min(max(a + weight * (b - a), min(a, b)), max(a, b)) for a, b in zip(mother, father, strict=True))


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
        got = f"start={start}, bounds={bounds}, population={population}"
        raise ConfigError(explain("A search needs shares within its bounds and two candidates", got, "Change them."))
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
        new = [shares for shares in dict.fromkeys(living) if shares not in known]
        known.update({shares: fitness(shares) for shares in track(new, f"search: generation {generation} of {generations}")})
        living = sorted(dict.fromkeys(living), key=known.__getitem__)[: max(2, population // 2)]
        if generation < generations:
            living += [mutated(blend(draw.choice(living), draw.choice(living), draw)) for _ in range(population - len(living))]
    return living[0]


@dataclass
class Node:
    """A path of the tree: how often each block runs, 1 where it is unchanged."""

    path: Path
    parent: Node | None = None
    visits: int = 0
    reward: float = 0.0
    children: list[Node] = field(default_factory=list)
    untried: list[Path] = field(default_factory=list)

    def worth(self, exploration: float, penalty: float) -> float:
        """The upper confidence bound, less what the length of the path costs."""
        bound = self.reward / self.visits + exploration * math.sqrt(math.log(self.parent.visits) / self.visits)
        return bound - penalty * sum(self.path) / len(self.path)


def edits(path: Path, runs: tuple[int, ...], gap: int) -> list[Path]:
    """The paths that change one more block, without more than `gap` skipped ones in a row."""
    changed = [(*path[:i], r, *path[i + 1 :]) for i, old in enumerate(path) if old == 1 for r in runs]
    return [new for new in changed if not any(sum(new[i : i + gap + 1]) == 0 for i in range(len(new) - gap))]


def search_path(
    reward: Callable[[Path], float],
    layers: int,
    *,
    simulations: int = 50,
    exploration: float = 1.8,
    penalty: float = 3.0,
    chance: float = 0.1,
    good: float = 1.0,
    runs: tuple[int, ...] = (0, 2),
    gap: int = 2,
    seed: int = 0,
) -> Path:
    """The shortest path that was found to be good, by a Monte Carlo tree search that minds the length; all ones if none is.

    A node's child changes one more block. A node gets its next child once it was visited often enough (progressive widening).

    Args:
        reward: What a path is worth, in [0, 1]; called once for each path.
        layers: Number of blocks.
        simulations: Paths that are tried.
        exploration: Weight of what was tried rarely.
        penalty: Weight of a path's length.
        chance: How often a child is picked at random.
        good: The reward from which a path is good. If all ones are not, the first good path ends the search.
        runs: What the runs of a block may change to.
        gap: How many blocks in a row may be skipped.
        seed: Seed of the search.
    """
    if layers < 1 or simulations < 0 or not set(runs) <= {0, 2}:
        got = f"layers={layers}, simulations={simulations}, runs={runs}"
        raise ConfigError(explain("A search for a path needs a block, and runs among (0, 2)", got, "Change them."))
    draw = random.Random(seed)
    start = (1,) * layers
    known = {start: reward(start)}
    best = start if known[start] >= good else None

    def grown(path: Path, parent: Node | None) -> Node:
        new = edits(path, runs, gap)
        draw.shuffle(new)
        return Node(path, parent, untried=new)

    root = node = grown(start, None)
    for _ in track(range(simulations), "search: paths"):
        while node.children and (not node.untried or len(node.children) > math.sqrt(node.visits)):
            likely = max(node.children, key=lambda child: child.worth(exploration, penalty))
            node = draw.choice(node.children) if draw.random() < chance else likely
        if node.untried:
            node.children.append(grown(node.untried.pop(), node))
            node = node.children[-1]
        path = node.path
        if path not in known:
            known[path] = reward(path)
        while node is not None:
            node.visits, node.reward, node = node.visits + 1, node.reward + known[path], node.parent
        node = root
        if known[path] >= good and (best is None or sum(path) < sum(best)):
            best = path
            if known[start] < good:
                break
    return start if best is None else best
