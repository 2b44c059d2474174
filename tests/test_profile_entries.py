"""A profile's entries taken apart and put together again, whatever was measured."""

from __future__ import annotations

from typing import Any

from made_profile import INT4, made_profile

from qquant.parts.base import remove
from qquant.profile_entries import holds, keys, merge, places, split


def entry() -> dict[str, Any]:
    rows = [{"key": f"l{n}", "length": n, "of": "old" if n > 16 else "new"} for n in (8, 16, 32)]
    return {
        "load": {"key": "a", "of": "new"},
        "speed": {"b1": {"key": "b", "of": "old"}, "b8": {"key": "c"}},
        "accuracy": {"domains": {"x": {"key": "d", "of": "old"}}},
        "long_context": {"text": "t", "rows": rows},
    }


def test_results_that_hold_are_parted_from_the_others() -> None:
    kept, rest = split(entry(), lambda result: holds(result, {"of": "new", "on": "here"}))
    assert sorted(keys(kept)) == ["a", "c", "l16", "l8"]  # what one does not tell is no matter
    assert sorted(keys(rest)) == ["b", "d", "l32"]
    assert list(places(rest)) == ["speed b1", "accuracy domains x", "long_context"]
    assert "accuracy" not in kept and "load" not in rest
    whole = merge(kept, rest)
    assert sorted(keys(whole)) == sorted(keys(entry()))
    assert {row["length"] for row in whole["long_context"]["rows"]} == {8, 16, 32}


def test_where_both_have_a_result_the_first_stays() -> None:
    one, other = (
        {"speed": {"b1": {"key": "1"}}},
        {"speed": {"b1": {"key": "2"}, "b2": {"key": "3"}}},
    )
    assert merge(one, other) == {"speed": {"b1": {"key": "1"}, "b2": {"key": "3"}}}
    rows = [{"key": k, "length": 8} for k in "12"]
    both = merge({"long_context": {"rows": rows[:1]}}, {"long_context": {"rows": rows[1:]}})
    assert both["long_context"]["rows"] == rows[:1]


def test_a_whole_profile_is_the_same_again() -> None:
    found = made_profile(2)["models"][INT4]
    assert split(found, lambda _: True) == (found, {})
    kept, rest = split(found, lambda _: False)
    assert not list(keys(kept)) and list(keys(rest)) == list(keys(found))
    assert merge(rest, kept) == found


def test_what_is_empty_goes_with_what_stood_in_it() -> None:
    found = entry()
    remove(found, ("accuracy", "domains", "x"))
    remove(found, ("speed", "b1"))
    remove(found, ("tasks", "mmlu"))
    assert "accuracy" not in found and list(found["speed"]) == ["b8"]
