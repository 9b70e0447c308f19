"""Selection of settings on held-out identities by coordinate-wise search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from market_study.protocols import Groups, variant_name

Changes = dict[str, str]


def climb(
    measure: Callable[[Sequence[Changes]], Sequence[float | None]],
    groups: Groups,
    *,
    rounds: int,
    margin: float,
) -> Changes:
    """Find the best changes in rounds of a coordinate-wise search.

    Each round tries every level of every group, one at a time, on the best changes so far,
    including the group's absence. The best level of a group is accepted if it gains more
    than the margin. Then all accepted levels are tried together; the next round starts from
    the best of that combination and of the single changes.

    Args:
        measure: Function that returns the score of each of several changes, larger is
            better; None for a failed run.
        groups: Groups of changes to try.
        rounds: Largest number of rounds.
        margin: Largest gain that counts as noise.

    Returns:
        Level of each changed group; empty for no change.

    Example:
        >>> worth = {"a": {"1": 2.0, "2": 3.0}, "b": {"1": -1.0}}
        >>> def measure(tried):
        ...     return [sum(worth[g][l] for g, l in c.items()) for c in tried]
        >>> groups = {g: {l: {} for l in levels} for g, levels in worth.items()}
        >>> climb(measure, groups, rounds=2, margin=0.5)
        {'a': '2'}
    """
    best: Changes = {}
    (score,) = measure([best])
    for _ in range(rounds):
        if score is None:
            break
        found = _round(measure, groups, best, score + margin)
        if found is None:
            break
        best, score = found
    return best


def _round(
    measure: Callable[[Sequence[Changes]], Sequence[float | None]],
    groups: Groups,
    best: Changes,
    least: float,
) -> tuple[Changes, float] | None:
    tried = one_at_a_time(groups, best)
    scores = dict(zip(map(variant_name, tried), measure(tried), strict=True))

    def score_of(changes: Changes) -> float:
        score = scores.get(variant_name(changes))
        return float("-inf") if score is None else score

    winners = []  # the best change of each group that gains
    for group in groups:
        of_group = [c for c in tried if c.get(group) != best.get(group)]
        winner = max(of_group, key=score_of)
        if score_of(winner) > least:
            winners.append((group, winner))
    if not winners:
        return None
    candidates = [winner for _, winner in winners]
    if len(winners) > 1:
        together = dict(best)
        for group, winner in winners:
            together.pop(group, None)
            if group in winner:
                together[group] = winner[group]
        (scores[variant_name(together)],) = measure([together])
        candidates.append(together)
    chosen = max(candidates, key=score_of)
    return chosen, score_of(chosen)


def one_at_a_time(groups: Groups, best: Mapping[str, str]) -> list[Changes]:
    """List the changes that differ from the best in exactly one group.

    Args:
        groups: Groups of changes to try.
        best: Level of each changed group.

    Returns:
        For each group its other levels, and its absence if the best has a level.
    """
    result = []
    for group, levels in groups.items():
        rest = {name: level for name, level in best.items() if name != group}
        result += [{**rest, group: level} for level in levels if level != best.get(group)]
        if group in best:
            result.append(rest)
    return result
