"""Several processes make what one makes, and the same bytes each time; a lost one loses nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Ranks
from test_convert import make, plain_weights, plain_weights_of
from test_resume import same

from qquant import convert
from qquant.batching import Batching
from qquant.bnb_spec import BnbSpec
from qquant.cli import cli
from qquant.config import CalibrationSpec, QuantSpec
from qquant.errors import SpecError, TargetError
from qquant.hessian import Hessian
from qquant.journal import agree
from qquant.methods import quantize
from qquant.publish import Guest, WorkDir
from qquant.reproduce import reproduce
from qquant.timings import NOT_FORESEEN
from qquant.world import Seat, World, _panels, join, launched

# 91 samples are 6 units, the last one a part: four ranks get one or two.
CALIB = {"samples": 91, "seqlen": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("distributed") / "src")


def call(source: Path, dst: Path, **more: Any) -> dict[str, Any]:
    return {"call": "quantize", "src": str(source), "dst": str(dst), "calib": CALIB, **more}


@pytest.fixture(scope="module")
def one(source: Path, ranks: Ranks) -> Path:
    """Made by a process alone, in one thread."""
    ranks(1, call(source, source.parent / "one"))
    return source.parent / "one"


@pytest.fixture(scope="module")
def two(source: Path, ranks: Ranks) -> Path:
    answers = ranks(2, call(source, source.parent / "two"))
    assert [a["path"] for a in answers] == [str(source.parent / "two")] * 2
    return source.parent / "two"


def manifest_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "qquant_manifest.json").read_text())
    return found


def near(found: Path, expected: Path, weights: Callable[[Path], Any] = plain_weights) -> None:
    """All but a few weights are the same; each linear's loss differs by rounding.

    The first linears see inputs that no rounding has reached: there the losses differ by that of
    one sum. From there on a code that falls on the other side changes all that follows.
    """
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (mine[name] == weight).float().mean() > 0.97, name
    rows, others = (manifest_of(d)["layers"] for d in (found, expected))
    assert [r["name"] for r in rows] == [r["name"] for r in others]
    assert rows[0]["loss"] == pytest.approx(others[0]["loss"], rel=1e-4)
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)


# Without processes.


@pytest.mark.parametrize("samples", [1, 3, 12, 91, 128])
@pytest.mark.parametrize("unit", [1, 2, 35])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_units_are_shared_out_whole(samples: int, unit: int, share: float, size: int) -> None:
    """Every unit that one process has once, in the streams that it has there, evenly."""
    batching = Batching(unit, 2 * unit)
    order, paired = batching.order(samples, share)
    worlds = [World(Seat(rank, size)) for rank in range(size)]
    shares = [batching.share(order, paired, world) for world in worlds]
    inside = torch.cat([own[:count] for own, count in shares])
    assert torch.equal(inside, order[:paired])
    outside = torch.cat([own[count:] for own, count in reversed(shares)])
    assert torch.equal(outside, order[paired:])
    units = [-(-count // unit) + -(-(len(own) - count) // unit) for own, count in shares]
    assert max(units) - min(units) <= 2
    assert batching.most(samples, share, size) == max(len(own) + count for own, count in shares)
    alone = [batching.share(*batching.order(samples, 1.0), world)[0] for world in worlds]
    assert batching.most(samples, 0, size) == max(map(len, alone))
    for own, count in shares:  # no batch without samples, none that is half in the second stream
        if len(own):
            first, second = batching.begin(own, count)
            assert all(0 < len(b) <= 2 * unit for b in first)
            assert [len(b) for b in second] == [
                len(b) if i * 2 * unit < count else 0 for i, b in enumerate(first)
            ]


def test_small_sums_share_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture has thousands of small Hessians, each in strips: two exchanges for one of them."""
    found: list[list[list[torch.Tensor]]] = []
    stats = Hessian(768, weights=[torch.zeros(768, 768)])
    stats.add_up(lambda parts: found.append(list(_panels(parts))))
    ((sums, counts),) = found
    assert len(sums) == 3 + 1 and counts[0].tolist() == [0, 0]
    monkeypatch.setattr("qquant.world.PANEL", 40 * 4)
    part = torch.arange(90.0).view(9, 10)
    panels = list(_panels([part, part[0], part[1].double(), part.view(-1)]))
    assert [sum(v.numel() for v in panel) for panel in panels] == [40, 40, 20, 10, 40, 40, 10]
    assert torch.equal(torch.cat([v.view(-1) for p in panels[:3] for v in p])[:90], part.view(-1))


def test_alone_nothing_is_imported() -> None:
    script = (
        "import sys\nfrom qquant.world import join\n"
        "with join() as world:\n    assert world.leads and world.collect(1) == [1]\n"
        "assert 'torch' not in sys.modules"
    )
    alone = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    subprocess.run([sys.executable, "-c", script], check=True, env=alone)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def be(rank: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
            monkeypatch.setenv(f"LOCAL_{name}", str(value))

    return be


def test_only_torchrun_makes_ranks(
    as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(1)
    assert launched() == Seat(1, 2, 1, 2)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launched() == Seat()


def test_one_gpu_for_all_is_refused(as_rank: Callable[[int], None]) -> None:
    as_rank(0)
    with pytest.raises(SpecError, match=r"got cuda:1.*own number"), join("cuda:1"):
        pass


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, 1e300, 43201])
def test_a_time_that_is_none_is_refused(as_rank: Callable[[int], None], minutes: float) -> None:
    as_rank(0)
    with (
        pytest.raises(SpecError, match=r"--rank-timeout: expected minutes.*at most 43200"),
        join("cpu", minutes),
    ):
        pass


def test_the_disk_has_room_for_what_all_machines_spill(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond: list[int] = []
    asked: list[int] = []

    def watch(needs: Any, *args: Any, **more: Any) -> Any:
        holder = replace(convert_make_holder(needs, *args, **more), host_budget=0)
        beyond.append(needs.beyond(holder))
        return holder

    class Refused(Exception):
        pass

    def refuse(*_: Any, need_bytes: int, **more: Any) -> None:
        asked.append(need_bytes)
        raise Refused

    convert_make_holder = convert.make_holder
    monkeypatch.setattr(convert, "make_holder", watch)
    monkeypatch.setattr(convert, "WorkDir", refuse)
    monkeypatch.setattr("qquant.convert._Run._estimate", lambda *_: None)
    calib = CalibrationSpec(**CALIB)
    for on_this_machine in (1, 4):
        world = World(Seat(0, 4, 0, on_this_machine))
        with pytest.raises(Refused):
            quantize(
                source, tmp_path / "dst", QuantSpec(group_size=32), calib, device="cpu", world=world
            )
    assert beyond[0] > 0 and beyond[0] == beyond[1]
    assert asked[0] == asked[1] > 4 * beyond[0]


def test_making_the_model_is_a_part_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate that a run makes is of what comes after it."""
    make_skeleton = convert.Skeleton

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return make_skeleton(*args)

    monkeypatch.setattr(convert, "Skeleton", slow)
    result = quantize(source, tmp_path / "dst", QuantSpec(group_size=32, method="rtn"))
    assert result.timings["set-up"] >= 0.5 and "set-up" in NOT_FORESEEN


def test_bitsandbytes_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    several = World(Seat(0, 2))
    with pytest.raises(SpecError, match=r"method nf4: expected one process.*got 2"):
        quantize(source, tmp_path / "dst", BnbSpec("nf4"), world=several)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_is_of_one_rank(
    source: Path, as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qquant.estimate._seconds", lambda *_: {})  # takes seconds
    words = ["quantize", str(source), "-o", "dst", "--dry-run", "--log-json", "--group-size", "32"]
    words += ["--samples", "128", "--seqlen", "64", "--device", "cpu"]
    whole = json.loads(CliRunner().invoke(cli, words).stdout)
    as_rank(0)
    half = json.loads(CliRunner().invoke(cli, words).stdout)
    assert half["waiting_bytes"] * 2 == whole["waiting_bytes"]
    assert half["output_bytes"] == whole["output_bytes"]
    assert half["disk_bytes"] == whole["disk_bytes"]  # kept activations are of all
    assert any("each of 2 processes" in note for note in half["notes"])
    as_rank(1)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0 and not result.output


# With processes.


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (40, 7), (64, 32)])
def test_sums_have_the_order_of_the_ranks(ranks: Ranks, shape: tuple[int, int]) -> None:
    size = 4
    answers = ranks(size, {"call": "add_up", "shape": shape, "panel": 256})
    parts = [torch.randn(*shape, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    expected = parts[0].clone()
    for part in parts[1:]:
        expected += part
    for answer in answers:
        assert torch.equal(torch.tensor(answer["sum"]), expected.T)
        assert torch.equal(torch.tensor(answer["twice"]), 2 * expected.T[0])
        assert answer["counts"] == [6, 10, 14]
        assert answer["rows"] == answer["sum"]
        assert answer["told"] == [{"rank": r, "text": "x" * r} for r in range(size)]


def test_two_make_what_one_makes(one: Path, two: Path) -> None:
    near(two, one)
    assert "processes" not in manifest_of(one)["machine"]
    assert manifest_of(two)["machine"]["processes"] == 2


def test_the_same_number_makes_the_same_bytes(
    source: Path, two: Path, tmp_path: Path, ranks: Ranks
) -> None:
    ranks(2, call(source, tmp_path / "again"))
    assert same(tmp_path / "again", two)


def test_four_make_what_one_makes(source: Path, one: Path, tmp_path: Path, ranks: Ranks) -> None:
    for name in ("dst", "again"):
        assert all(a["linears"] == 10 for a in ranks(4, call(source, tmp_path / name)))
    near(tmp_path / "dst", one)
    assert same(tmp_path / "dst", tmp_path / "again")
    assert len(list(tmp_path.iterdir())) == 2  # no work is left


def test_a_rank_may_have_no_batch(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    few = {"samples": 3, "seqlen": 64}
    ranks(1, call(source, tmp_path / "one", calib=few))
    lost = call(source, tmp_path / "dst", calib=few)
    answers = ranks(4, [{**lost, "kill": 1} if r == 3 else lost for r in range(4)])
    assert answers[3]["exit"] == -signal.SIGKILL
    assert ranks(4, lost)[0]["resumed"] == [1]
    near(tmp_path / "dst", tmp_path / "one")


SPECS = {
    "one stream": {"correct": 0.0, "correct_residual": 0.0},
    "rounded": {"method": "rtn"},
    "mixed": {"target_bpw": 6.0},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_other_settings(source: Path, tmp_path: Path, ranks: Ranks, spec: dict[str, Any]) -> None:
    # In bfloat16 a code that falls on the other side changes more of what follows.
    more = {"spec": spec, "compute_dtype": "float32"}
    ranks(1, call(source, tmp_path / "one", **more))
    ranks(2, call(source, tmp_path / "two", **more))
    near(tmp_path / "two", tmp_path / "one", plain_weights_of)
    # The choice of bits is measured by one rank: it is the very same.
    assert manifest_of(tmp_path / "two")["mixed"] == manifest_of(tmp_path / "one")["mixed"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_run_and_loses_nothing(
    source: Path, two: Path, tmp_path: Path, ranks: Ranks, lost: int
) -> None:
    dst = tmp_path / "dst"
    calls = [call(source, dst), call(source, dst)]
    calls[lost]["kill"] = 1
    answers = ranks(2, calls)
    assert answers[lost]["exit"] == -signal.SIGKILL
    other = answers[1 - lost]
    assert other["error"] == "RankLostError" and f"rank {1 - lost} of 2" in other["text"]
    assert not dst.exists()
    assert (tmp_path / ".dst.qquant-work" / "state" / "block-1-rank-1").is_dir()

    # Another number of processes would make other bytes.
    refused = ranks(1, call(source, dst))
    assert refused[0]["error"] == "TargetError" and "processes: 2 then, 1 now" in refused[0]["text"]
    refused = ranks(4, call(source, dst))
    assert all("processes: 2 then, 4 now" in answer["text"] for answer in refused)

    assert ranks(2, call(source, dst))[0]["resumed"] == [1]
    assert same(dst, two)
    assert not (tmp_path / ".dst.qquant-work").exists()


def test_a_rank_that_fails_tells_the_others_why(
    source: Path, two: Path, tmp_path: Path, ranks: Ranks
) -> None:
    good = call(source, tmp_path / "dst")
    # Here the first rank holds what they leave for one another, which under torchrun is torchrun.
    answers = ranks(2, [good, {**good, "fail": 1}])
    assert [a["error"] for a in answers] == ["RankLostError", "RunError"]
    assert not (tmp_path / "dst").exists()
    assert "rank 1: the test: got a failure" in answers[0]["text"]
    ranks(2, good)
    assert same(tmp_path / "dst", two)


def test_what_the_first_rank_refuses_is_refused_everywhere(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    (tmp_path / "file").write_text("")
    answers = ranks(2, call(source, tmp_path / "file" / "dst"))
    assert {a["error"] for a in answers} == {"TargetError"}
    assert len({a["text"] for a in answers}) == 1


def test_a_rank_that_says_nothing_is_given_up(ranks: Ranks) -> None:
    answers = ranks(2, {"call": "silent", "minutes": 0.03})
    assert answers[0]["seconds"] < 10
    assert "expected an answer within 0.03 minutes" in answers[0]["text"]


def test_ranks_that_would_do_different_things_are_refused(
    source: Path, tmp_path: Path, ranks: Ranks
) -> None:
    good = call(source, tmp_path / "dst")
    answers = ranks(2, [good, {**good, "spec": {"bits": 3}}])
    assert {a["error"] for a in answers} == {"SpecError"}
    assert all("quant.bits: 4 in rank 0, 3 in rank 1" in a["text"] for a in answers)
    answers = ranks(2, [good, {**good, "src": str(tmp_path / "none")}])
    assert {a["error"] for a in answers} == {"CheckpointError"}
    assert answers[0]["text"].startswith("rank 1: ")
    assert not list(tmp_path.iterdir())


def test_only_the_first_rank_speaks(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--device", "cpu"]
    words += ["--group-size", "32", "--samples", "8", "--seqlen", "24", "--log-json"]
    first, second = ranks(2, {"call": "command", "words": words})
    events = [json.loads(line) for line in first["out"].splitlines()]
    assert [e["event"] for e in events].count("linear_done") == 10
    assert events[-1]["event"] == "done" and events[-1]["processes"] == 2
    assert (second["code"], second["out"], second["err"]) == (0, "", "")
    # The same command once more: it is there already, told once.
    first, second = ranks(2, {"call": "command", "words": words})
    assert (first["code"], json.loads(first["out"].splitlines()[-1])["already"]) == (0, True)
    assert (second["code"], second["out"], second["err"]) == (0, "", "")
    # Another one finds the target in its way: a refusal, told once. Words that cannot be parsed:
    # likewise.
    for more in (["--seed", "1"], ["--bist"]):
        first, second = ranks(2, {"call": "command", "words": [*words, *more]})
        assert first["code"] == second["code"] == 2
        told = [json.loads(line)["event"] for line in first["out"].splitlines()]
        assert told[-1] == "error" and told.count("error") == 1
        assert (second["out"], second["err"]) == ("", "")


def test_reproducing_alone_names_the_processes(source: Path, two: Path) -> None:
    found = reproduce(two, source)
    assert "processes: 2 then, 1 now" in " ".join(found.circumstances)
    assert "qquant_manifest.json" in found.different


def test_a_disk_of_ones_own_is_refused(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "dst") as work:
        root, owner = work.invitation
        assert Guest((root, owner)).state == work.state
        with pytest.raises(TargetError, match=r"the one of process 1 on elsewhere.*all ranks"):
            Guest((root, "process 1 on elsewhere"))
    with pytest.raises(TargetError, match="nothing there"):
        Guest((root, owner))


def test_agreement_of_one_process() -> None:
    agree({"a": (1, 2)}, World())


def test_torchrun_interrupted_and_gone_on_with(source: Path, tmp_path: Path) -> None:
    """The real thing: Ctrl-C to torchrun after the first block, then the same command."""
    words = ["-m", "qquant", "quantize", str(source), "--device", "cpu", "--group-size", "32"]
    words += ["--samples", "91", "--seqlen", "64", "--log-json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone"]
    # hqq, where it is installed, has functions compiled as it is imported: seconds of each process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}

    def start(dst: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*torchrun, *words, "-o", str(dst)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )

    dst = tmp_path / "dst"
    with start(dst) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "block_done":
                os.killpg(process.pid, signal.SIGINT)  # a terminal tells all of them
                break
        out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and not dst.exists()
    assert "interrupted; no target was written" in err
    assert json.loads(out.splitlines()[-1])["exit_code"] == 130
    assert (tmp_path / ".dst.qquant-work" / "state" / "journal.json").is_file()
    with start(dst) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert {"event": "resumed", "block": 1, "blocks": 2, "linears": 5} in events
    assert manifest_of(dst)["machine"]["processes"] == 2


def test_the_engine_knows_no_processes() -> None:
    """What computes has no call of torch's distributed engine in it; one module has."""
    import qquant

    root = Path(qquant.__file__).parent
    users = [p.name for p in root.rglob("*.py") if "torch.distributed" in p.read_text()]
    assert users == ["world.py"]
