"""Reading and writing in threads changes neither bytes nor how a run ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import SPEC, TOKENS, native_checkpoint

import qquant.blocks as blocks
import qquant.convert as convert
from qquant import QuantSpec, directory, quantize, verify_directory
from qquant.checkpoint import Checkpoint
from qquant.errors import CheckpointError, TargetError
from qquant.journal import Journal
from qquant.manifest import NAME as MANIFEST
from qquant.overlap import Ahead, Later, overlaps
from qquant.shards import ShardWriter


def ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qquant-")]


@pytest.mark.parametrize("threaded", [False, True])
def test_calls_keep_their_order(threaded: bool) -> None:
    later, seen = Later(threaded=threaded, most=2), []
    for i in range(9):
        later(lambda i=i: seen.append((i, threading.current_thread() is threading.main_thread())))
    later.settle()
    assert seen == [(i, not threaded) for i in range(9)]
    later.close()
    assert not ours()


def test_no_more_wait_than_may() -> None:
    later, held = Later(threaded=True, most=2), threading.Event()
    asked: list[int] = []

    def ask() -> None:
        for i in range(4):
            later(held.wait)
            asked.append(i)

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(0.3)
    assert asking.is_alive() and asked == [0, 1]
    held.set()
    asking.join()
    later.close()
    assert asked == [0, 1, 2, 3]


def fail() -> None:
    raise TargetError("cannot write")


def test_an_error_comes_out_at_once_where_there_is_no_thread() -> None:
    later = Later(threaded=False)
    with pytest.raises(TargetError):
        later(fail)


def test_an_error_comes_out_once_and_what_waits_behind_it_is_not_made() -> None:
    later, held, made = Later(threaded=True), threading.Event(), list[int]()

    def slow_fail() -> None:
        held.wait()
        fail()

    def made_slowly() -> None:
        made.append(1)
        time.sleep(0.2)

    for call in (slow_fail, made_slowly, lambda: made.append(2), lambda: made.append(3)):
        later(call)
    held.set()
    with pytest.raises(TargetError):
        later.settle()
    assert made in ([], [1])  # the one that was under way
    later.settle()
    later.close()
    assert made in ([], [1]) and not ours()


def test_what_is_ahead_is_taken_once() -> None:
    made: list[tuple[int, str]] = []

    def make(key: int) -> int:
        made.append((key, threading.current_thread().name[:6]))
        if key == 3:
            raise CheckpointError("three")
        return 10 * key

    ahead = Ahead(make, threaded=True)
    assert ahead.take(0) == 0
    ahead.prepare(1)
    assert ahead.take(1) == 10 and ahead.take(2) == 20
    assert made == [(0, "MainTh"), (1, "qquant"), (2, "MainTh")]
    ahead.prepare(3)
    with pytest.raises(CheckpointError, match="three"):
        ahead.take(3)
    ahead.prepare(4)
    ahead.close()
    assert not ours()


def test_a_cpu_is_not_free() -> None:
    assert not overlaps("cpu") and overlaps("cuda")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return native_checkpoint(tmp_path / "src", "qwen2", num_hidden_layers=3)


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(method="rtn", group_size=32)])
def test_the_bytes_are_the_same(
    source: Path, tmp_path: Path, spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantize(source, tmp_path / "plain", spec, tokens=TOKENS, device="cpu")
    monkeypatch.setattr(blocks, "overlaps", lambda _: True)
    names: set[str] = set()
    write = ShardWriter.write

    def noted(self: ShardWriter, *args: object) -> None:
        names.add(threading.current_thread().name)
        write(self, *args)

    def hashed(self: Checkpoint, *stop: Any) -> str:
        names.add(f"{threading.current_thread().name} hashes")
        return sha256(self, *stop)

    sha256 = Checkpoint.sha256
    monkeypatch.setattr(convert, "overlaps", lambda _: True)
    monkeypatch.setattr(Checkpoint, "sha256", hashed)
    monkeypatch.setattr(ShardWriter, "write", noted)
    apart = quantize(source, tmp_path / "apart", spec, tokens=TOKENS, device="cpu")
    assert any(name.startswith("qquant-write") for name in names)
    assert [name[:11] for name in names if name.endswith("hashes")] == ["qquant-read"]
    assert weights(plain.path) == weights(apart.path) and not ours()
    manifests = [(made.path / MANIFEST).read_bytes() for made in (plain, apart)]
    assert manifests[0] == manifests[1]


def test_files_are_hashed_once_and_while_the_last_block_is_made_durable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, too, which has nothing else to do then."""
    begun, waited, hashed = threading.Event(), [], []
    sha256, commit = directory.sha256_file, Journal.commit

    def noted(path: Path, stop: threading.Event | None = None) -> str:
        hashed.append(path)
        if stop is not None:
            begun.set()
        return sha256(path, stop)

    def waits(self: Journal, block: int, *args: Any) -> None:
        waited.append(begun.wait(30) if block == 3 else not begun.is_set())
        commit(self, block, *args)

    with monkeypatch.context() as patched:
        patched.setattr(directory, "sha256_file", noted)
        patched.setattr(Journal, "commit", waits)
        made = quantize(source, tmp_path / "dst", SPEC, tokens=TOKENS, device="cpu")
    assert waited and all(waited) and not ours()
    shards = [path for path in hashed if path.suffix == ".safetensors"]
    assert len(shards) == 2 and source / "model.safetensors" in shards
    assert verify_directory(made.path).ok


def test_a_write_that_fails_ends_the_run_and_it_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantize(source, tmp_path / "plain", SPEC, tokens=TOKENS, device="cpu")
    monkeypatch.setattr(blocks, "overlaps", lambda _: True)
    write, dst = ShardWriter.write, tmp_path / "dst"

    def full(self: ShardWriter, name: str, *args: object) -> None:
        if name.startswith("model.layers.1.mlp"):
            raise TargetError("cannot write", got="no room")
        write(self, name, *args)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", full)
        with pytest.raises(TargetError, match="no room"):
            quantize(source, dst, SPEC, tokens=TOKENS, device="cpu")
    assert not dst.exists() and not ours()
    made = quantize(source, dst, SPEC, tokens=TOKENS, device="cpu")
    assert made.resumed == 1 and weights(made.path) == weights(plain.path)


def test_a_run_that_fails_does_not_wait_for_the_sources_hash(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take minutes where the source lies on a slow disk."""
    for module in (blocks, convert):
        monkeypatch.setattr(module, "overlaps", lambda _: True)
    hashed: list[Path] = []

    def slow(path: Path, stop: threading.Event | None = None) -> str:
        hashed.append(path)
        assert stop is not None and stop.wait(60)
        return ""

    write = ShardWriter.write

    def full(self: ShardWriter, name: str, *args: object) -> None:
        if name.startswith("model.layers.1.mlp"):
            raise TargetError("cannot write", got="no room")
        write(self, name, *args)

    monkeypatch.setattr(directory, "sha256_file", slow)
    monkeypatch.setattr(ShardWriter, "write", full)
    started = time.monotonic()
    with pytest.raises(TargetError, match="no room"):
        quantize(source, tmp_path / "dst", SPEC, tokens=TOKENS, device="cpu")
    assert hashed and time.monotonic() - started < 30 and not ours()


def test_a_damaged_block_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name = source / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(blocks, "overlaps", lambda _: True)
    with pytest.raises(CheckpointError, match=name):
        quantize(source, tmp_path / "dst", SPEC, tokens=TOKENS, device="cpu")
    assert not ours()
