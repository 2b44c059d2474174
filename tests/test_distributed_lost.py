"""What a rank says and does when another one is lost, is late, comes back, or refuses the input."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks
from safetensors.torch import load_file, save_file
from test_convert import make
from test_distributed import call

from qquant.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("lost") / "src")


def words(source: Path, dst: Path) -> list[str]:
    return ["quantize", str(source), "-o", str(dst), "--device", "cpu", "--group-size", "32"]


# `torchrun --max-restarts`: one store for all attempts.


def test_an_attempt_knows_nothing_of_the_one_before(ranks: Ranks) -> None:
    common = {"call": "attempt", "store": "of several attempts"}
    # What is a failure of the first one is not told for the end of another rank in a later one.
    good, failing = common, {**common, "fail": "a failure of attempt 0"}
    first, second = ranks(2, [good, failing])
    assert "rank 1: the test: got a failure of attempt 0" in first["text"]
    assert second["error"] == "RunError"
    # Each rank in turn is back long before the other, and finds what was left.
    for late in (0, 1):
        calls = [{**common, "late": 0.7 * (rank == late)} for rank in range(2)]
        assert [a.get("ranks") for a in ranks(2, calls)] == [[0, 1], [0, 1]]
    first, second = ranks(2, [good, {**common, "kill": True}])
    assert second["exit"] == -signal.SIGKILL
    assert first["error"] == "RankLostError" and "is lost" in first["text"]
    assert "attempt 0" not in first["text"]
    # torchrun counts attempts, but each machine its own failures: the counts differ.
    counted = [{**common, "environment": {"TORCHELASTIC_RESTART_COUNT": n}} for n in (2, 1)]
    assert [a.get("ranks") for a in ranks(2, counted)] == [[0, 1], [0, 1]]


def test_who_has_not_come_is_named(ranks: Ranks) -> None:
    come = {"call": "attempt", "minutes": 0.02, "store": "of torchrun"}
    answers = ranks(3, [come, come, {**come, "late": 3}])
    assert "got nothing from rank 2" in answers[0]["text"]
    assert "says why where it ran" in answers[0]["text"]


# One rank works, the others wait.


def test_a_long_job_of_the_first_rank_is_waited_for_tick_by_tick(ranks: Ranks) -> None:
    job = {"call": "alone", "parts": 4, "minutes": 0.05}  # 3 seconds
    answers = ranks(3, {**job, "ticks": True})
    assert [a["made"] for a in answers] == [["done"] * 4] * 3
    # Without a word from it the others end, and say what helps; so does the first, left by them.
    for answer in ranks(2, {**job, "ticks": False}):
        assert answer["error"] == "RankLostError"
        assert "--rank-timeout above 0.05" in answer["text"]
        assert "No target" not in answer["text"]


def test_a_closed_connection_is_no_matter_of_time(ranks: Ranks) -> None:
    come = {"call": "attempt"}
    first, _ = ranks(2, [come, {**come, "kill": True}])
    assert "--rank-timeout" not in first["text"]
    assert "Blocks that were kept are gone on with by the same command" in first["text"]


def test_measuring_bits_may_take_longer_than_a_rank_waits(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    # Two blocks, there and back, of 3 seconds each; ranks wait for 7.2.
    more = {"spec": {"target_bpw": 6.0}, "slow": 3, "minutes": 0.12}
    few = {"samples": 8, "seqlen": 24}
    answers = ranks(2, call(source, tmp_path / "dst", calib=few, **more))
    assert [a.get("path") for a in answers] == [str(tmp_path / "dst")] * 2


def test_a_target_that_stands_is_not_spoilt_by_a_lost_rank(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    good = call(source, tmp_path / "dst", calib={"samples": 8, "seqlen": 24})
    first, second = ranks(2, [good, {**good, "leaves": True}])
    assert second["exit"] == -signal.SIGKILL
    assert (first.get("path"), first.get("kept")) == (str(tmp_path / "dst"), [])
    assert verify(tmp_path / "dst").ok
    assert [p.name for p in tmp_path.iterdir()] == ["dst"]


# Refusals.


@pytest.mark.parametrize("option", [["--bist"], ["--samples", "0"]])
def test_what_one_machine_refuses_is_told_there(
    source: Path, tmp_path: Path, ranks: Ranks, option: list[str]
) -> None:
    """Two machines of two ranks: the first of each speaks, though none of this one leads."""
    bad: list[dict[str, Any]] = [
        {
            "call": "command",
            "words": [*words(source, tmp_path / "dst"), "--log-json", *option],
            "environment": {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"},
        }
        for rank in range(4)
    ]
    answers = ranks(4, bad)
    assert [a["code"] for a in answers] == [2] * 4
    assert json.loads(answers[0]["out"])["event"] == "error"
    assert "error: rank 2: " in answers[2]["err"] and answers[2]["out"] == ""
    assert [answers[r]["err"] + answers[r]["out"] for r in (1, 3)] == ["", ""]
    people = [{**b, "words": [w for w in b["words"] if w != "--log-json"]} for b in bad]
    answers = ranks(4, people)
    for answer in answers[::2]:
        assert option[0] in answer["err"] or "samples" in answer["err"]
    assert [answers[r]["err"] + answers[r]["out"] for r in (1, 3)] == ["", ""]


def test_a_damaged_head_is_bad_input_for_all(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    broken = tmp_path / "src"
    broken.mkdir()
    for path in source.iterdir():
        os.link(path, broken / path.name)
    (file,) = (p for p in broken.glob("*.safetensors") if "lm_head.weight" in load_file(p))
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][3, 5] = torch.nan
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    few = ["--samples", "8", "--seqlen", "24"]
    command = {"call": "command", "words": [*words(broken, tmp_path / "dst"), *few]}
    first, second = ranks(2, command)
    assert (first["code"], second["code"]) == (2, 2)
    assert "lm_head.weight" in first["err"].splitlines()[-1]
    assert (second["out"], second["err"]) == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
