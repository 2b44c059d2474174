"""The accuracy benchmark's verdicts, and how its parts are put together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(candidate: str, bits: int, kl: float, wall: float = 10.0, **more: Any) -> dict[str, Any]:
    """A row whose sequences differ by a factor that all candidates share."""
    each = [kl * share for share in (0.5, 1.0, 1.5)]
    run = {
        "wall_s": wall,
        "work_s": wall,
        "cpu_s": wall,
        "max_rss_kib": 1024,
        "tree_anon_kib": 1024,
        "load_before": 0.0,
        "seconds": {"quantize": wall},
        "versions": {},
        "settings": {},
    }
    score = {"kl": kl, "kl_se": 0.0, "top1": 1.0, "ppl": 2.0, "ppl_source": 2.0, "tokens": 40960}
    score["kl_per_sequence"] = each
    return {"candidate": candidate, "bits": bits, "runs": [run], "score": score, **more}


def full_result(**kl: float) -> dict[str, Any]:
    """A result in which everything passes, unless a candidate's KL is given."""
    levels = {"qquant": 0.5, "best": 0.4, "gptqmodel": 1.1, "llmcompressor": 1.0, "autoround": 0.6}
    levels |= kl
    walls = {"qquant": 10.0, "best": 90.0, "autoround": 100.0}
    names = {"best": "qquant:recipe=best"}
    rows = [
        row(names.get(name, name), bits, level, walls.get(name, 30.0))
        for bits in (4, 3, 2)
        for name, level in levels.items()
    ]
    config = dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"), 1
    )
    return {
        "checkpoint": "x",
        "commands": ["one"],
        "config": config,
        "weights_sha256": "w",
        "machine": {"cpu": "c", "cores": 2, "flags": [], "memory_gib": 1},
        "calibration": {"samples": 1, "seqlen": 1, "source": "in", "sha256": "c"},
        "heldout_sha256": "h",
        "threads": 2,
        "group_size": 128,
        "date": "2026-01-01",
        "rows": rows,
    }


def test_all_bars_of_the_project_are_there() -> None:
    from bars import bars_for

    bars = {(b.candidate, b.against, b.quantity, b.bits): b.limit for b in bars_for("in")}
    assert bars.pop(("qquant", "peer", "kl", 4)) == 0.75
    assert bars.pop(("qquant", "peer", "kl", 3)) == 0.60
    assert bars.pop(("qquant", "peer", "kl", 2)) == 0.60
    for bits in (4, 3, 2):
        assert bars.pop(("qquant", "autoround", "kl", bits)) == 1.0
        assert bars.pop(("qquant", "autoround", "wall", bits)) == 0.2
        assert bars.pop(("qquant:recipe=best", "autoround", "kl", bits)) == 0.85
        assert bars.pop(("qquant:recipe=best", "autoround", "wall", bits)) == 1.0
    assert not bars
    (out,) = bars_for("out")
    assert (out.candidate, out.against, out.bits, out.limit) == ("qquant", "peer", 4, 0.92)
    assert not bars_for("some.txt")


def test_a_good_result_passes() -> None:
    from bars import report

    for result in (full_result(), full_result(qquant=0.59, best=0.50)):
        lines, passed = report(result)
        assert passed and all(line.startswith("pass") for line in lines[1:])


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"qquant": 0.61}, 5),  # 0.61 of the peer at 3 and 2 bits, 1.02 of AutoRound at all three
        ({"best": 0.52}, 3),
        ({"llmcompressor": 0.6}, 3),  # the best of the two tools counts
        ({"gptqmodel": 0.6}, 3),
    ],
)
def test_faults_are_counted(changes: dict[str, float], fails: int) -> None:
    from bars import report

    lines, passed = report(full_result(**changes))
    assert not passed
    assert len([line for line in lines if line.startswith("FAIL")]) == fails


def test_time_is_held_against_autoround() -> None:
    from bars import report

    result = full_result()
    for r in result["rows"]:
        if r["candidate"] == "qquant" and r["bits"] == 3:
            r["runs"] = [{**r["runs"][0], "wall_s": seconds} for seconds in (19.0, 21.0, 50.0)]
    lines, passed = report(result)
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert not passed and "3 bits, qquant: wall" in failed and "21.0 s of 100.0 s" in failed


def test_times_of_a_busy_machine_are_neither_judged_nor_shown() -> None:
    from bars import report
    from report_table import markdown

    result = full_result()
    for r in result["rows"]:
        r["runs"][0]["others_cores"] = 0.05
    assert report(result)[1] and "| wall s |" in markdown(result)
    for r in result["rows"]:
        if r["candidate"] == "autoround" and r["bits"] == 3:
            r["runs"][0]["others_cores"] = 0.8
    lines, passed = report(result)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert not passed and len(failed) == 2  # the default's time and best's, at 3 bits
    assert all("3 bits" in line and "not timed idle" in line for line in failed)
    text = markdown(result)
    assert "wall" not in text and "10.0" not in text
    assert "not idle (others kept up to 0.80" in text


def test_what_was_not_measured_is_not_passed_and_says_why() -> None:
    from bars import report

    result = full_result()
    for r in result["rows"]:
        if r["candidate"] == "autoround" and r["bits"] == 2:
            r.update(runs=[], score=None, failed="W2A16 is not known")
    result["rows"] = [r for r in result["rows"] if "best" not in r["candidate"]]
    lines, passed = report(result)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert not passed and len(failed) == 8
    assert sum("autoround was not measured (W2A16 is not known)" in line for line in failed) == 2
    assert sum("recipe=best was not measured" in line for line in failed) == 6


def test_too_little_held_out_text_fails() -> None:
    from bars import report

    result = full_result()
    result["rows"][0]["score"]["tokens"] = 39_999
    lines, passed = report(result)
    assert not passed and lines[-1].startswith("FAIL")


def test_interval_is_of_the_paired_ratio() -> None:
    from bars import Bar, judge
    from report_table import paired_ratio

    rows = [row("qquant", 4, 0.5), row("gptqmodel", 4, 1.0)]
    verdict = judge(Bar("qquant", "peer", "kl", 4, 0.75), rows)
    # Sequences differ threefold, but both alike: paired, the ratio is the same in every draw.
    assert verdict.ratio == verdict.low == verdict.high == pytest.approx(0.5)
    rows[0]["score"]["kl_per_sequence"] = [0.75, 0.5, 0.25]
    verdict = judge(Bar("qquant", "peer", "kl", 4, 0.75), rows)
    assert verdict.low is not None and verdict.high is not None
    assert verdict.low < 0.5 < verdict.high and verdict.ratio == pytest.approx(0.5)

    import random

    generator = random.Random(5)
    theirs = [generator.uniform(0.8, 1.2) for _ in range(400)]
    ours = [0.5 * x * generator.uniform(0.9, 1.1) for x in theirs]
    ratio, low, high = paired_ratio(ours, theirs)
    # The standard error of a mean of 400 factors that are uniform within 10%.
    expected = 1.96 * 0.5 * (0.1 / 3**0.5) / 400**0.5
    assert high - ratio == pytest.approx(expected, rel=0.25)
    assert ratio - low == pytest.approx(expected, rel=0.25)


def test_exit_status(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(full_result()))
    bad.write_text(json.dumps(full_result(qquant=2.0)))
    command = [sys.executable, str(BENCHMARKS / "bars.py")]
    done = subprocess.run([*command, str(good)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "FAIL" not in done.stdout
    done = subprocess.run([*command, str(good), str(bad)], capture_output=True, check=False)
    assert done.returncode == 1


def test_results_merge_only_when_they_are_about_the_same() -> None:
    from results import merged

    old, new = full_result(), full_result(qquant=0.7)
    new["rows"] = [r for r in new["rows"] if r["candidate"] == "qquant" and r["bits"] == 4]
    new["commands"] = ["two"]
    both = merged(old, new, ["gptqmodel", "qquant"])
    assert len(both["rows"]) == 15 and both["commands"] == ["one", "two"]
    assert [r["bits"] for r in both["rows"]] == [4] * 5 + [3] * 5 + [2] * 5
    assert [r["candidate"] for r in both["rows"]][:2] == ["gptqmodel", "qquant"]
    assert both["rows"][1]["score"]["kl"] == 0.7
    for key in ("weights_sha256", "heldout_sha256", "threads"):
        with pytest.raises(ValueError, match=key):
            merged({**old, key: "other"}, new, [])
    for row in new["rows"]:  # others used the machine, so that no times are shown anyway
        row["runs"][0]["others_cores"] = 1.0
    assert merged({**old, "threads": 1}, {**new, "threads": 2}, [])["threads"] == "1 or 2"
    again = merged({**old, "threads": "1 or 2"}, {**new, "threads": 1}, [])
    assert again["threads"] == "1 or 2"
    assert merged(old, new, [])["threads"] == old["threads"]
    other = {**old["calibration"], "sha256": "other"}
    with pytest.raises(ValueError, match="calibration"):
        merged({**old, "calibration": other}, new, [])


def test_table_has_both_ratios_and_names_failures() -> None:
    from report_table import markdown

    result = full_result()
    result["rows"].append(row("rtn", 2, 9.0, skipped="", failed=""))
    result["rows"].append(
        {"candidate": "other", "bits": 2, "runs": [], "score": None, "failed": "no 2 bits"}
    )
    text = markdown(json.loads(json.dumps(result)))
    line = next(line for line in text.splitlines() if line.startswith("| `qquant` "))
    assert "0.500 (0.500 to 0.500)" in line and "0.833 (0.833 to 0.833)" in line
    assert "`other` failed: no 2 bits" in text
    assert "own domain" in text


def test_messages_lose_the_machines_directories() -> None:
    from results import command, last_line, public

    text = "Traceback\n  File x\nValueError: /a/b/c.safetensors: no 2 bits in '/d/e'\n\n"
    assert last_line(text) == "ValueError: c.safetensors: no 2 bits in 'e'"
    assert public("/a/b/text.txt") == "text.txt" and public("in") == "in"
    given = "--preset demo --work /a/b --python-x=/c/python --python-y /d --bits 4 3 --bars"
    assert command("q.py", given.split()) == (
        "python benchmarks/q.py --preset demo --bits 4 3 --bars"
    )
    assert command("q.py", ["--chat", "/a/b.json"]) == "python benchmarks/q.py --chat b.json"


def test_an_unknown_recipe_is_skipped_not_run() -> None:
    from quantize import Candidate

    assert Candidate.parse("qquant:recipe=fast").unknown() == ""
    assert Candidate.parse("gptqmodel:recipe=x").unknown() == ""
    assert "no recipe 'none-such'" in Candidate.parse("qquant:recipe=none-such").unknown()


def test_results_are_named_after_what_was_measured() -> None:
    from quantize import default_name

    assert default_name("speed", None, None) == "speed"
    assert default_name("demo", None, "in") == "accuracy-demo"
    assert default_name("second", None, "out") == "accuracy-second-out"
    assert default_name(None, Path("a/model"), None) == "model"


def test_builtin_set_as_text_holds_what_was_said_and_no_markup() -> None:
    from token_files import plain, read_text

    from qquant.calibration.formats import Text
    from qquant.calibration.sources import read_source

    text = read_text("builtin", [])
    first = read_source("builtin").documents[0]
    assert text.startswith(plain(first)) and "<|im_start|>" not in text
    assert plain(Text("a")) == "a"
    assert len(text) > 200_000


def test_calibration_table() -> None:
    from calibration import markdown, merged

    def entry(source: str, samples: int, kl: float) -> dict[str, Any]:
        score = {"kl": kl, "kl_se": kl / 10, "tokens": 20480, "kl_per_sequence": [kl, 3 * kl]}
        return {"source": source, "samples": samples, "in": score, "out": {**score, "kl": 2 * kl}}

    result = {
        "checkpoint": "x",
        "bits": 4,
        "recipe": "default",
        "seqlen": 512,
        "heldout": {"in": "code", "out": "prose"},
        "heldout_sha256": {"in": "a", "out": "b"},
        "machine": {"cpu": "c", "cores": 2},
        "date": "2026-01-01",
        "commands": ["one"],
        "rows": [entry("self", 16, 0.003)],
        "skipped": {"builtin": "later"},
    }
    more = {**result, "rows": [entry("builtin", 32, 0.001)], "commands": ["two"], "skipped": {}}
    both = merged(result, more)
    assert [row["source"] for row in both["rows"]] == ["builtin", "self"]
    assert both["skipped"] == {}
    text = markdown(both)
    assert "| `builtin` | - | 1.000 ± 0.1 |" in text
    assert "| `builtin` | - | 2.000 ± 0.1 |" in text
    assert "beside" not in text  # nothing of the usual calibration was measured
    both["rows"].append(entry("builtin", 128, 0.002))
    text = markdown(both)
    assert text.count("- `self`, 16 samples: 1.500 (1.500 to 1.500)") == 2
    assert "- `builtin`, 128" not in text
    for key, value in (("bits", 3), ("heldout_sha256", {"in": "a", "out": "c"})):
        with pytest.raises(ValueError, match=key):
            merged({**result, key: value}, more)


def test_usual_calibration_is_the_commands_default() -> None:
    from calibration import USUAL

    from qquant.config import CalibrationSpec

    assert (CalibrationSpec().sources, CalibrationSpec().samples) == ((USUAL[0],), USUAL[1])
