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
    sides[1]["gsm8k"]["asked"] = "other questions"
    assert changed(before, after)[f"{INT4} GSM8K"].words == "within noise"
    assert any("GSM8K questions" in what for what, *_ in compare(before, after).conditions)
    for tasks in sides:
        del tasks["gsm8k"]["questions"]
    assert changed(before, after)[f"{INT4} GSM8K"].words == "within noise"


def test_rows_of_another_text_are_not_paired() -> None:
    before, after = made_profile(2), made_profile(2)
    domains = [p["models"][INT4]["accuracy"]["domains"]["wiki.txt"] for p in (before, after)]
    for place, domain in enumerate(domains):
        domain["rows"]["nll"] = [2.0, 3.0, 4.0, 5.0]
        domain["rows"]["nll"] = [value + 0.01 * place for value in domain["rows"]["nll"]]
    key = f"{INT4} wiki.txt: loss per token"
    assert changed(before, after)[key].words == "outside noise"
    domains[1]["sha256"] = "another"
    assert changed(before, after)[key].words == "no error known"
    assert any("wiki.txt (a hash)" in what for what, *_ in compare(before, after).conditions)
    domains[0]["rows"]["nll"][1] = None  # not finite
    assert key not in changed(before, after)


def test_few_rows_have_a_wide_interval_and_a_mean_of_subjects_is_paired_by_subject() -> None:
    """Student's: 3.18 standard errors for four rows; subjects weigh alike whatever their sizes."""
    before, after = made_profile(2), made_profile(2)
    domains = [p["models"][INT4]["accuracy"]["domains"]["wiki.txt"] for p in (before, after)]
    domains[0]["rows"]["nll"], domains[1]["rows"]["nll"] = [2.0] * 4, [2.1, 2.2, 2.3, 2.4]
    interval = changed(before, after)[f"{INT4} wiki.txt: loss per token"].interval
    error = (sum((x - 0.25) ** 2 for x in (0.1, 0.2, 0.3, 0.4)) / 3 / 4) ** 0.5
    assert interval == pytest.approx((0.25 - 3.182 * error, 0.25 + 3.182 * error), abs=1e-3)
    tasks = [p["models"][INT4]["tasks"]["mmlu"] for p in (before, after)]
    answers = ([1] * 4 + [1] * 12, [0, 1, 0, 1] + [1] * 12)
    for task, found in zip(tasks, answers, strict=True):
        score = [sum(found[:4]) / 8 + sum(found[4:]) / 24, 0.1]
        task |= {"questions": found, "mean": "subjects", "score": score}
        task["subjects"] = [["a", 4], ["b", 12]]
    change = changed(before, after)[f"{INT4} MMLU"]
    error = (1 / 3 / 4 / 4) ** 0.5 * 100  # half of the variance of the first subject's mean
    assert change.difference == pytest.approx(-25) and change.interval is not None
    assert change.interval == pytest.approx((-25 - 1.96 * error, -25 + 1.96 * error), abs=1e-2)


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
