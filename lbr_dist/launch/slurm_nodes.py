"""Slurm's node lists, and what the checks of an allocation make of the nodes' answers. Pure functions.

A check that says "something is slow" helps nobody: every finding names the node, or the pair of nodes, to take out.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SKEW_S = 1.0
"""Largest difference between two clocks: what file times and logs of several nodes can bear."""
SLOW = 0.5
"""A pair of nodes below this share of the usual bandwidth (the median of each node's best) is slow."""


@dataclass
class Node:
    """What one node answered."""

    name: str
    skew_s: float = 0.0
    """Its clock less the first node's."""
    gpus: int = 0
    errors: list[str] = field(default_factory=list)
    """What it could not do, or what others saw."""


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` nodes once, in rounds in which no node is in two pairs (a round-robin tournament)."""
    ring: list[int | None] = [*range(count)] + [None] * (count % 2)
    half = len(ring) // 2
    found = []
    for _ in range(len(ring) - 1):
        opposite = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def table(nodes: Sequence[Node], speeds: Mapping[tuple[int, int], float | str]) -> list[str]:
    """What was measured, a line for each node; arguments as for `findings`."""
    lines = [f"{'node':<16} {'clock':>9} {'GPUs':>5}  all-reduce with another node, GB/s: lowest, highest"]
    for index, node in enumerate(nodes):
        own = [speed for pair, speed in speeds.items() if index in pair and isinstance(speed, float)]
        span = f"{min(own):.2f}  {max(own):.2f}" if own else "-"
        lines.append(f"{node.name:<16} {node.skew_s * 1e3:>+6.0f} ms {node.gpus:>5}  {span}")
    return lines


def findings(nodes: Sequence[Node], speeds: Mapping[tuple[int, int], float | str]) -> list[str]:
    """What is wrong, each with the node or the pair at fault.

    Args:
        nodes: their answers; the first is the reference for clocks.
        speeds: GB/s of each measured pair of indexes into `nodes`, or why there is no figure.
    """
    found = [f"{node.name}: {error}" for node in nodes for error in node.errors]
    middle = statistics.median([node.skew_s for node in nodes])
    for node in nodes:
        if abs(node.skew_s - middle) > SKEW_S:
            found.append(f"{node.name}: its clock is {node.skew_s - middle:+.1f} s from the other nodes'")
    usual = Counter(node.gpus for node in nodes).most_common(1)[0][0]
    found += [f"{node.name}: {node.gpus} GPUs, others have {usual}" for node in nodes if node.gpus != usual]
    return found + _slow(nodes, speeds)


def _slow(nodes: Sequence[Node], speeds: Mapping[tuple[int, int], float | str]) -> list[str]:
    """A node that is bad in all its pairs while others are good is named alone."""
    best = [
        max((speed for pair, speed in speeds.items() if index in pair and isinstance(speed, float)), default=0.0)
        for index in range(len(nodes))
    ]
    usual = statistics.median(best)  # of three nodes, one slow one is in two pairs of three, but is one of three bests
    bad = {
        pair: speed if isinstance(speed, str) else f"{speed:.2f} GB/s, usual are {usual:.2f}"
        for pair, speed in speeds.items()
        if isinstance(speed, str) or speed < SLOW * usual
    }
    found, blamed = [], set[int]()
    for index, node in enumerate(nodes):
        own = [pair for pair in speeds if index in pair]
        if len(own) > 1 and all(pair in bad for pair in own) and len(bad) < len(speeds):
            blamed.add(index)
            found.append(f"{node.name}: all-reduce with every other node is bad, as {bad[own[0]]}")
    for (a, b), why in bad.items():
        if not {a, b} & blamed:
            found.append(f"{nodes[a].name} and {nodes[b].name}: all-reduce is bad: {why}")
    return found
