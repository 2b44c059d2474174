"""`qquant compare`: what changed, conditions first, and whether it is outside noise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_profile import INT4, INT8, REFERENCE, made_profile

from qquant.cli import cli
from qquant.reporting import png
from qquant.reporting.changes import Change, compare


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Change]:
    found = compare(before, after)
    return {f"{c.model} {c.figure}": c for c in found.changes if c.words != "the same"}


def test_a_profile_is_the_same_as_itself() -> None:
    found = compare(made_profile(2), made_profile(2))
    assert found.changes and all(c.words == "the same" for c in found.changes)
    assert not found.conditions and not found.only_before and not found.only_after
    assert found.render() == f"{len(found.changes)} figures in both: {len(found.changes)} the same"


def test_a_difference_is_told_from_noise() -> None:
    after = made_profile(2)
    wiki = after["models"][INT4]["accuracy"]["domains"]["wiki.txt"]
    wiki["perplexity"][0] += 0.1  # its error is 0.21
    wiki["kl"][0] *= 2
    after["models"][INT4]["load"]["file_bytes"] -= 1000
    found = changed(made_profile(2), after)
    assert {name: c.words for name, c in found.items()} == {
        f"{INT4} wiki.txt: perplexity": "within noise",
        f"{INT4} wiki.txt: KL": "outside noise",
        f"{INT4} files": "no error known",
    }
    ppl = found[f"{INT4} wiki.txt: perplexity"]
    assert ppl.difference == pytest.approx(0.1)
    assert ppl.interval == pytest.approx((0.1 - 0.5821, 0.1 + 0.5821), abs=1e-3)


def test_questions_are_paired_where_both_have_them() -> None:
    """A tenth of the questions lost and none won is outside noise for pairs; their two scores
    alone could not tell."""
    before, after = made_profile(2), made_profile(2)
    sides = (before["models"][INT4]["tasks"], after["models"][INT4]["tasks"])
    asked = [1, 0, 1, 1] * 20
    lost = [*asked]
    for place in range(0, 32, 4):
        lost[place] = 0
    for tasks, answers in zip(sides, (asked, lost), strict=True):
        share = sum(answers) / len(answers)
        tasks["gsm8k"] |= {"questions": answers, "score": [share, 0.05], "n": 80}
    change = changed(before, after)[f"{INT4} GSM8K"]
    assert change.words == "outside noise" and change.difference == pytest.approx(-10)
    for tasks in sides:
        del tasks["gsm8k"]["questions"]
    assert changed(before, after)[f"{INT4} GSM8K"].words == "within noise"


def test_a_rate_within_the_spread_of_its_runs_is_noise() -> None:
    after = made_profile(2)
    setting = "modern-b1-c512-n64"
    after["models"][INT8]["speed"][setting]["decode_tokens_per_s"] *= 1.02
    words = changed(made_profile(2), after)[f"{INT8} {setting}: decode"].words
    assert words == "within noise"
    after["models"][INT8]["speed"][setting]["decode_tokens_per_s"] *= 1.5
    words = changed(made_profile(2), after)[f"{INT8} {setting}: decode"].words
    assert words == "outside noise"


def test_conditions_come_first() -> None:
    after = made_profile(2)
    after["machine"]["versions"]["torch"] = "2.14.0"
    after["machine"]["date"] = "2027-01-01"
    after["protocol"]["seqlen"] = 1024
    after["seeds"]["qwen_sampling"] = 7
    after["models"][INT4]["load"]["kernel"] = "marlin"
    after["models"][INT4]["tasks"]["mmlu"]["shots"] = 5
    after["models"][INT4]["load"]["weight_bytes"] += 1
    after["models"]["new"] = copy.deepcopy(after["models"][INT4])
    del after["models"][INT8]["long_context"]
    found = compare(made_profile(2), after)
    assert found.conditions == (
        ("version of torch", "2.13.0", "2.14.0"),
        ("protocol, seqlen", "512", "1024"),
        ("protocol, seed of qwen sampling", "1024", "7"),
        (f"{INT4}, kernel", "torch-int4: 160 linears", "marlin"),
        (f"{INT4}, MMLU shots", "0", "5"),
    )
    assert found.only_after == ("new",) and len(found.only_before) == 12
    text = found.render()
    assert text.startswith("measured under other conditions:\n  version of torch: 2.13.0 -> 2.14.0")
    assert text.index("only in the first") < text.index("weights in memory")


def test_the_command(tmp_path: Path) -> None:
    after = made_profile(2)
    after["models"][REFERENCE]["load"]["file_bytes"] = 1
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, found in zip(paths, (made_profile(2), after), strict=True):
        path.write_text(json.dumps(found))
    words = ["compare", *map(str, paths)]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0 and "1 no error known" in shown.stdout
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert [c for c in found["changes"] if c["difference"]] == [
        {
            "model": REFERENCE,
            "figure": "files",
            "unit": "bytes",
            "before": 15_442_653_184,
            "after": 1,
            "difference": 1 - 15_442_653_184,
            "interval": None,
            "words": "no error known",
        }
    ]
    refused = CliRunner().invoke(cli, ["compare", str(paths[0]), str(tmp_path / "c.json")])
    assert refused.exit_code == 2 and refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_reports_can_be_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "draw", lambda chart: b"PNG")
    (tmp_path / "profile.json").write_text(json.dumps(made_profile(2)))
    words = ["report", str(tmp_path / "profile.json"), "-o", str(tmp_path / "public")]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "public" / "report.html").exists()
    assert str(tmp_path / "public" / "REPORT.md") in shown.stdout.splitlines()
