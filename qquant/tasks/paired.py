"""What one model lost against another on the same questions, with its error.

Two scores of 55% each have a standard error of, say, 1.2 points; their difference has far less,
because both models meet the same questions and answer most of them alike. So it is taken question
by question. Questions are independent, so errors add in squares: in one mean over all of them, or,
where a benchmark is the mean of its subjects' means, in each subject. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, variance

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Lost:
    """A mean difference; error and interval (95%, normal) are None where one question is all."""

    value: float
    stderr: float | None

    @property
    def interval(self) -> list[float] | None:
        if self.stderr is None:
            return None
        return [self.value - Z95 * self.stderr, self.value + Z95 * self.stderr]


def lost(
    reference: Sequence[float],
    candidate: Sequence[float],
    *,
    subjects: Sequence[int] = (),
    higher_is_better: bool = True,
) -> Lost:
    """How much worse the candidate is, question by question.

    Args:
        reference, candidate: a figure for each question, in the same order.
        subjects: sizes of the subjects, in order, where the score is the mean of their means.
        higher_is_better: of the figures.

    Raises:
        ValueError: the questions are not the same number, or not those of the subjects, or a figure
            is not finite.
    """
    sign = 1.0 if higher_is_better else -1.0
    pairs = zip(reference, candidate, strict=True)
    differences = [sign * (one - other) for one, other in pairs]
    sizes = list(subjects) or [len(differences)]
    if sum(sizes) != len(differences) or min(sizes) < 1:
        raise ValueError(f"{len(differences)} questions in subjects of {sizes}")
    if not all(map(math.isfinite, differences)):
        raise ValueError("a question's figure is not finite")
    means, errors, start = [], [], 0
    for size in sizes:
        part = differences[start : start + size]
        start += size
        means.append(math.fsum(part) / size)
        errors.append(variance(part) / size if size > 1 else None)
    value = math.fsum(means) / len(means)
    if None in errors:
        return Lost(value, None)
    return Lost(value, math.sqrt(math.fsum(e for e in errors if e is not None)) / len(means))
