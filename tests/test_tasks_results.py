"""What is kept of lm-eval's results, and which two results are compared question by question."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qquant.parts.tasks import TaskPart
from qquant.tasks import manager
from qquant.tasks.options import TaskSpec
from qquant.tasks.run import _result

PART = TaskPart(TaskSpec("some"), "some", "data", "lm-eval 0")


def sample(doc: int, value: Any, kind: str = "none", metric: str = "acc") -> dict[str, Any]:
    return {"doc_id": doc, "doc_hash": str(doc), "filter": kind, metric: value}


def evaluated(samples: dict[str, list[Any]], score: Any, **changed: Any) -> dict[str, Any]:
    """As lm-eval gives it, of a group `some` if there are several tasks."""
    leaves = list(samples)
    top = "some" if len(leaves) > 1 else leaves[0]
    return {
        "samples": samples,
        "results": {top: {"acc,none": score, "acc_stderr,none": 0.1}},
        "groups": {"some": {}} if len(leaves) > 1 else {},
        "group_subtasks": {"some": leaves},
        "configs": {name: {"metric_list": [{"metric": "acc"}]} for name in leaves},
        "higher_is_better": {name: {"acc": True} for name in leaves},
        "n-shot": dict.fromkeys(leaves, 0),
    } | changed


def results(monkeypatch: pytest.MonkeyPatch, found: Any, mean: str = "questions") -> dict[str, Any]:
    monkeypatch.setattr(manager, "mean_over", lambda *_: mean)
    return _result(found, TaskSpec("some"), None)


TWO = {"a": [sample(0, 1), sample(1, 0)], "b": [sample(0, 1)]}


@pytest.mark.parametrize(
    ("mean", "score", "kept"),
    [
        ("questions", 2 / 3, True),
        ("questions", 0.75, False),
        ("subjects", 0.75, True),
        ("subjects", 2 / 3, False),
        ("questions", "N/A", False),
    ],
)
def test_questions_are_kept_where_the_score_is_their_mean(
    monkeypatch: pytest.MonkeyPatch, mean: str, score: Any, kept: bool
) -> None:
    result = results(monkeypatch, evaluated(TWO, score), mean)
    assert result["mean"] == mean and result["subjects"] == [["a", 2], ["b", 1]]
    assert result.get("questions") == ([1, 0, 1] if kept else None)


def test_a_task_without_the_groups_metric_is_no_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GSM8K in `metabench`, whose answers are read by filters of its own."""
    samples = {**TWO, "c": [sample(0, 1, "strict", "exact_match")]}
    result = results(monkeypatch, evaluated(samples, 0.75), "subjects")
    assert result["subjects"] == [["a", 2], ["b", 1]] and result["questions"] == [1, 0, 1]
    stored = {**result, "model": "ours", "under": "x"}
    assert PART.pair(stored, stored)["lost"][0] == 0


def test_an_unknown_direction_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(TWO, 2 / 3, higher_is_better={"a": {"acc": None}})
    result = results(monkeypatch, found)
    assert result["higher_is_better"] is None
    stored = {**result, "model": "ours", "under": "x"}
    assert PART.pair(stored, stored) == {}


def stored(**changed: Any) -> dict[str, Any]:
    return {
        "model": "ours",
        "under": "x",
        "asked": "0123",
        "mean": "subjects",
        "subjects": [["a", 2], ["b", 1]],
        "questions": [1, 0, 1],
        "higher_is_better": True,
    } | changed


def test_what_was_measured_alike_is_paired() -> None:
    found = PART.pair(stored(questions=[0, 0, 1]), stored(model="theirs"))
    assert found["lost"] == [0.25, None] and found["paired_with"] == "theirs"
    for key in ("under", "asked", "mean"):
        assert PART.pair(stored(**{key: "questions"}), stored()) == {}
    assert PART.pair(stored(asked=None), stored(asked=None)) == {}


@pytest.mark.parametrize("key", [key for key in stored() if key != "under"])
@pytest.mark.parametrize("value", ["missing", None, 3, "ab", [], [None], [["a", 0], ["b", 3]]])
def test_nothing_is_paired_with_a_damaged_result(key: str, value: Any) -> None:
    """Whatever stands in the file: the rest of the profile is saved."""
    bad = stored()
    if value == "missing":
        del bad[key]
    else:
        bad[key] = value
    alone = PART.pair(bad, stored()), PART.pair(stored(), bad), PART.pair(bad, bad)
    for found in alone:
        assert found == {} or math.isfinite(found["lost"][0])
    if value in ("missing", None):
        assert alone[2] == {} and alone[0 if key != "model" else 1] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, 1e308])
def test_figures_that_cannot_be_written_are_not_paired(value: float) -> None:
    assert PART.pair(stored(questions=[value, 0, 1]), stored()) == {}


@pytest.mark.parametrize("sizes", [[-1, 4], [3, 0], [2, 2], [1.0, 2.0], ["2", 1]])
def test_subjects_of_impossible_sizes_are_not_paired(sizes: list[Any]) -> None:
    bad = stored(subjects=[["a", sizes[0]], ["b", sizes[1]]])
    assert PART.pair(bad, bad) == {}
