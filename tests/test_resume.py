"""A run that ended early goes on with the same command, and ends in the same bytes.

Runs that kill -9 ended are in test_killed.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_convert import SPEC, make, native_checkpoint

from qquant import blocks, journal
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.config import CalibrationSpec, QuantSpec
from qquant.convert import quantize
from qquant.errors import AlreadyDone, CheckpointError, QQuantError, RunError, TargetError
from qquant.events import BlockDone, Event, Kept, Resumed, Stage
from qquant.result import Result

CALIB = CalibrationSpec(samples=16, seqlen=24)


def run(
    src: Path,
    dst: Path,
    spec: QuantSpec = SPEC,
    *,
    watch: Callable[[Event], None] = lambda _: None,
    **more: object,
) -> tuple[Result, list[Event]]:
    events: list[Event] = []

    def see(event: Event) -> None:
        events.append(event)
        watch(event)

    return quantize(src, dst, spec, CALIB, device="cpu", progress=see, **more), events


def stop_after(block: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, BlockDone) and event.block == block:
            raise KeyboardInterrupt

    return watch


def stopped(src: Path, dst: Path, spec: QuantSpec = SPEC, block: int = 0) -> Path:
    """A run for `dst` that ended after `block`; its work directory."""
    with pytest.raises(KeyboardInterrupt):
        run(src, dst, spec, watch=stop_after(block))
    return dst.parent / f".{dst.name}.qquant-work"


def same(one: Path, other: Path) -> bool:
    files = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in (one, other)]
    assert files[0] == files[1] and files[0]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("resume") / "src")


@pytest.fixture(scope="module")
def reference(source: Path) -> Path:
    return run(source, source.parent / "reference")[0].path


RECIPES = {
    "default": SPEC,
    "one stream": replace(SPEC, correct=0.0, correct_residual=0.0),
    "rounded": replace(SPEC, method="rtn"),
    "mixed": replace(SPEC, target_bpw=6.0),
}


@pytest.mark.parametrize("spec", RECIPES.values(), ids=RECIPES)
def test_the_same_command_goes_on_and_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(source, tmp_path / "whole", spec)
    dst = tmp_path / "dst"
    work = stopped(source, dst, spec)
    assert not dst.exists() and work.is_dir()

    loaded: list[int] = []
    original = blocks.Skeleton.load
    monkeypatch.setattr(
        blocks.Skeleton,
        "load",
        lambda self, index, *more: (loaded.append(index), original(self, index, *more))[1],
    )
    result, events = run(source, dst, spec)
    assert loaded == [1]  # of two: nothing is done again
    (resumed,) = [e for e in events if isinstance(e, Resumed)]
    assert (resumed.block, resumed.blocks) == (1, 2)
    assert result.resumed == 1 and len(result.layers) == len(whole.layers)
    assert same(dst, whole.path)
    assert not work.exists()


def test_what_is_kept_is_said(source: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        quantize(
            source,
            tmp_path / "dst",
            SPEC,
            CALIB,
            device="cpu",
            progress=lambda e: (events.append(e), stop_after(0)(e)),
        )
    assert events[-1] == Kept(str(tmp_path / ".dst.qquant-work"), 1, 2)


def test_the_text_is_not_read_again(
    source: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qquant.convert as convert

    stopped(source, tmp_path / "dst")
    monkeypatch.setattr(convert, "calibration_tokens", None)
    run(source, tmp_path / "dst")
    assert same(tmp_path / "dst", reference)


def test_a_run_after_its_last_block_is_only_finished(
    source: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if event == Stage("publish"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "dst", watch=stop)
    # The first attempt's side files are there, and must not be in the way.
    assert (tmp_path / ".dst.qquant-work" / "out" / "config.json").is_file()
    monkeypatch.setattr(blocks.Skeleton, "load", None)
    run(source, tmp_path / "dst")
    assert same(tmp_path / "dst", reference)


def test_another_run_is_refused_and_nothing_is_lost(
    source: Path, tmp_path: Path, reference: Path
) -> None:
    work = stopped(source, tmp_path / "dst")
    other = replace(SPEC, bits=3, damp=0.2)
    with pytest.raises(TargetError) as caught:
        run(source, tmp_path / "dst", other)
    text = str(caught.value)
    assert "quant.bits: 4 then, 3 now" in text and "quant.damp" in text and "--restart" in text
    assert "group_size" not in text
    with pytest.raises(TargetError, match="samples: 16 then, 8 now"):
        quantize(source, tmp_path / "dst", SPEC, replace(CALIB, samples=8), device="cpu")
    assert work.is_dir()
    result, _ = run(source, tmp_path / "dst")
    assert result.resumed == 1 and same(tmp_path / "dst", reference)


def test_restart_begins_anew(source: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, bits=3)
    whole, _ = run(source, tmp_path / "whole", spec)
    stopped(source, tmp_path / "dst")
    result, _ = run(source, tmp_path / "dst", spec, restart=True)
    assert result.resumed == 0 and same(tmp_path / "dst", whole.path)


def test_another_method_does_not_sweep_the_work_away(source: Path, tmp_path: Path) -> None:
    from qquant.publish import WorkDir

    work = stopped(source, tmp_path / "dst")
    with pytest.raises(TargetError, match="can go on"), WorkDir(tmp_path / "dst"):
        pass
    assert (work / "state" / "journal.json").is_file()
    with WorkDir(tmp_path / "dst", restart=True):
        pass
    assert not work.exists()


def test_threads_and_versions_are_part_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(source, tmp_path / "dst")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(TargetError, match=r"threads: [0-9]+ then, 77 now"):
        run(source, tmp_path / "dst")
    monkeypatch.undo()
    monkeypatch.setattr("qquant.manifest.__version__", "9.9")
    with pytest.raises(TargetError, match=r"version of qquant: .* then, 9\.9 now"):
        run(source, tmp_path / "dst")


def test_files_and_device_are_part_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("Some words to read. " * 200)
    calib = CalibrationSpec((str(mine),), samples=6, seqlen=24)
    again = partial(quantize, source, tmp_path / "dst", SPEC, calib, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        again(progress=stop_after(0))
    monkeypatch.setattr("qquant.identity.device_name", lambda _: "another")
    with pytest.raises(TargetError, match=r"device: cpu, .* then, cpu, another now"):
        again()
    monkeypatch.undo()
    os.utime(mine, ns=(1, 1))
    with pytest.raises(TargetError, match=r"calibration file .*mine\.txt"):
        again()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def damage_tensors(work: Path) -> None:
    from qquant.headers import read_header

    path = work / "out" / "model.safetensors"
    info = next(t for t in read_header(path).tensors if t.name.endswith("h.0.mlp.w1.qweight"))
    flip(path, info.start)


def damage_activations(work: Path) -> None:
    path = work / "state" / "block-1" / "model.safetensors"
    flip(path, path.stat().st_size - 1)


def shorten_activations(work: Path) -> None:
    path = work / "state" / "block-1" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def damage_ids(work: Path) -> None:
    path = work / "state" / "ids" / "model.safetensors"
    flip(path, path.stat().st_size - 8)


def damage_journal(work: Path) -> None:
    (work / "state" / "journal.json").write_text('{"format": 1, "block": 1')


def lose_a_shard(work: Path) -> None:
    (work / "out" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        damage_activations,
        shorten_activations,
        damage_ids,
        damage_journal,
        lose_a_shard,
    ],
)
def test_what_is_damaged_is_not_gone_on_with(
    source: Path, tmp_path: Path, reference: Path, damage: Callable[[Path], None]
) -> None:
    damage(stopped(source, tmp_path / "dst"))
    with pytest.raises(QQuantError) as caught:
        run(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert isinstance(caught.value, RunError | TargetError)
    run(source, tmp_path / "dst", restart=True)
    assert same(tmp_path / "dst", reference)


def test_a_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(source, src)
    stopped(src, tmp_path / "dst")
    os.utime(src / "model.safetensors", ns=(1, 1))
    with pytest.raises(TargetError, match=r"source file model\.safetensors"):
        run(src, tmp_path / "dst")


def test_a_source_that_changes_meanwhile_is_caught(source: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(source, src)

    def touch(event: Event) -> None:
        if isinstance(event, BlockDone):
            os.utime(src / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"source file model\.safetensors"):
        run(src, tmp_path / "dst", watch=touch)
    assert not (tmp_path / "dst").exists()


def test_dear_commits_come_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keeping a block would take too long, an earlier one is gone on from: the blocks after
    it, which the shards have already, are done again, and the bytes are the same."""
    source = native_checkpoint(tmp_path / "src", "qwen2", num_hidden_layers=4)
    ids = torch.randint(0, 256, (4, 24))
    reference = run(source, tmp_path / "reference", tokens=ids)[0].path
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "due", lambda *_: asked.append(1) or len(asked) == 1)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "dst", watch=stop_after(2), tokens=ids)
    assert len(asked) > 1
    _, events = run(source, tmp_path / "dst", tokens=ids)
    assert [e.block for e in events if isinstance(e, Resumed)] == [1]
    assert same(tmp_path / "dst", reference)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_BYTES_PER_SECOND", 1e-3)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "other", watch=stop_after(0), tokens=ids)
        assert not (tmp_path / ".other.qquant-work").exists()  # nothing was kept


def test_what_was_found_before_the_first_block_is_kept_where_it_took_long(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RECIPES["mixed"]
    reference = run(source, tmp_path / "reference", spec)[0].path
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_BYTES_PER_SECOND", 1e-3)
        assert stopped(source, tmp_path / "dst", spec).is_dir()
    monkeypatch.setattr("qquant.convert.measure", None)
    run(source, tmp_path / "dst", spec)
    assert same(tmp_path / "dst", reference)


def test_the_same_command_once_more(source: Path, tmp_path: Path) -> None:
    """What it would make stands there already; what another would make is in its way."""
    source = Path(shutil.copytree(source, tmp_path / "src"))
    texts = tmp_path / "texts.txt"
    texts.write_text("Some words to calibrate with. " * 400)
    calib = CalibrationSpec(sources=(str(texts),), samples=4, seqlen=24)
    work, dst = tmp_path / ".dst.qquant-work", tmp_path / "dst"

    def again(**changes: Any) -> None:
        given = {"quant": QuantSpec(group_size=32), "calib": calib, "device": "cpu"} | changes
        quantize(source, dst, **given)

    again()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in dst.iterdir()}
    (work / "state").mkdir(parents=True)
    (work / "lock").touch()  # left by a kill after the rename
    with pytest.raises(AlreadyDone, match="nothing to do"):
        again()
    assert not work.exists()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in dst.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):  # another run, which can be gone on with
        run(source, dst, watch=stop_after(0), overwrite=True)
    with pytest.raises(AlreadyDone, match="nothing to do"):
        again()
    assert (work / "out").is_dir()
    shutil.rmtree(work)

    def refused(**changes: Any) -> None:
        with pytest.raises(TargetError, match="nothing there yet") as found:
            again(**changes)
        assert not isinstance(found.value, AlreadyDone)

    with pytest.MonkeyPatch.context() as patched:  # nor is the source read to find out
        patched.setattr(Checkpoint, "sha256", lambda _: pytest.fail("the source was read"))
        refused(quant=QuantSpec(group_size=32, damp=0.02))
    refused(calib=replace(calib, seed=1))
    refused(tokens=torch.zeros(4, 24, dtype=torch.int64))
    other = tmp_path / "other" / "texts.txt"
    other.parent.mkdir()
    refused(calib=replace(calib, sources=(str(other),)))  # not even there
    other.write_text("Words of another file of the same name. " * 400)
    os.utime(other, ns=(1, 1))
    refused(calib=replace(calib, sources=(str(other),)))
    texts.write_text("Other words, of another day. " * 400)
    os.utime(texts)
    refused()
    rounded = QuantSpec(method="rtn", group_size=32)
    again(quant=rounded, overwrite=True)
    with pytest.raises(AlreadyDone):
        again(quant=rounded)  # reads no texts
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    refused(quant=rounded)  # another source


@pytest.mark.parametrize("key", ["quantization", "calibration", "calibration.sources", None])
def test_a_manifest_that_is_none_is_in_the_way(
    source: Path, tmp_path: Path, key: str | None
) -> None:
    """Whatever stands in it, the target is somebody else's."""
    spec, dst = QuantSpec(group_size=32), tmp_path / "dst"
    calib = CalibrationSpec(samples=4, seqlen=24)
    quantize(source, dst, spec, calib, device="cpu")
    made = json.loads((dst / "qquant_manifest.json").read_text())
    if key == "calibration.sources":
        made["calibration"]["sources"] = "text"
    elif key:
        made[key] = "text"
    (dst / "qquant_manifest.json").write_text(json.dumps(made if key else [made]))
    with pytest.raises(TargetError, match="nothing there yet"):
        quantize(source, dst, spec, calib, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "nf4"])
def test_the_command_once_more_is_no_error(source: Path, tmp_path: Path, method: str) -> None:
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--method", method]
    words += ["--device", "cpu"]
    if method == "gptq":
        words += ["--samples", "4", "--seqlen", "16", "--group-size", "32", "--recipe", "fast"]
    first, second = (CliRunner().invoke(cli, [*words, "--log-json"]) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, second.output
    done = [json.loads(result.stdout.splitlines()[-1]) for result in (first, second)]
    assert [said["event"] for said in done] == ["done", "done"]
    assert done[0]["path"] == done[1]["path"] == str(tmp_path / "dst")
    assert "already" not in done[0] and done[1]["already"] is True
    assert "nothing to do" in CliRunner().invoke(cli, words).stdout
    assert CliRunner().invoke(cli, [*words, "--dtype", "float32"]).exit_code == 2


def test_commits_take_two_per_cent_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs as told: first by a guess of the disk's speed, then by what one took."""
    now = [1000.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    state = journal.Journal(tmp_path, {}, _last=now[0])
    streams = [[torch.zeros(10_000)], [torch.zeros(10_000)]]  # 80 kB: 80 us at 1 GB/s, 2% of 4 ms

    def write(*_: Any) -> dict[str, str]:
        now[0] += 3.0
        return {}

    monkeypatch.setattr(state, "_write", write)
    assert not state.due(streams)
    now[0] += 0.0041
    assert state.due(streams)
    state.commit(1, {}, None, streams)  # three seconds
    for later, due in ((0, False), (149, False), (2, True)):
        now[0] += later
        assert state.due(streams) == due
