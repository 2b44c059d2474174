"""The shard writer: the library's bytes in any order, and nothing unfinished accepted."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant.checkpoint import Checkpoint
from qquant.directory import CONFIG, INDEX, WEIGHTS
from qquant.errors import RunError, TargetError
from qquant.headers import TensorPlan, dtype_name
from qquant.shards import ShardWriter, shard_names, split_shards

BIG = 1 << 30
G = torch.Generator().manual_seed(0)
TENSORS = {
    "wte.weight": torch.randn((50, 16), generator=G).half(),
    "h.0.qweight": torch.randint(-9, 9, (6, 10), generator=G, dtype=torch.int32),
    "h.0.scales": torch.randn((3, 5), generator=G).bfloat16(),
    "h.0.bias": torch.randn((7,), generator=G),
    "flag": torch.tensor(True),
    "empty": torch.zeros((0, 3)),
}


def plan_of(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [TensorPlan(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]


def test_any_order_gives_the_librarys_bytes(tmp_path: Path):
    save_file(TENSORS, tmp_path / "library", {"format": "pt"})
    for seed in range(3):
        (out := tmp_path / str(seed)).mkdir()
        names = list(TENSORS)
        random.Random(seed).shuffle(names)
        with ShardWriter(out, plan_of(TENSORS), BIG) as writer:
            for name in names:
                writer.write(name, TENSORS[name])
        assert os.listdir(out) == [WEIGHTS]
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "library").read_bytes()


def test_rows_in_any_order_make_the_tensor(tmp_path: Path):
    table = TENSORS["wte.weight"]
    with ShardWriter(tmp_path, plan_of({"wte.weight": table}), BIG) as writer:
        for start, stop in [(30, 50), (0, 7), (7, 30)]:
            writer.write_rows("wte.weight", start, table[start:stop])
    assert torch.equal(load_file(tmp_path / WEIGHTS)["wte.weight"], table)


def test_views_are_written_as_they_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("qquant.shards._PIECE", 64)  # many pieces
    wide = torch.arange(60, dtype=torch.int32).reshape(10, 6)
    tensors = {"turned": wide.t(), "strided": wide[:, ::2], "slice": wide[3:7]}
    with ShardWriter(tmp_path, plan_of(tensors), BIG) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(tensor, tensors[name])


def test_shards_and_index(tmp_path: Path):
    size = TENSORS["wte.weight"].nbytes
    with ShardWriter(tmp_path, plan_of(TENSORS), size, {"made_by": "test"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        files = writer.close()
    first, second = shard_names(2)
    assert first == "model-00001-of-00002.safetensors"
    assert files == (first, second, INDEX) and sorted(os.listdir(tmp_path)) == sorted(files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    assert index["weight_map"] == {n: first if n == "wte.weight" else second for n in TENSORS}
    (tmp_path / CONFIG).write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.headers[second].metadata == {"format": "pt", "made_by": "test"}
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_cutting_keeps_order_and_size():
    def lengths(shards: list[list[TensorPlan]]) -> list[list[int]]:
        return [[t.nbytes for t in shard] for shard in shards]

    plan = [TensorPlan(str(i), "U8", (n,)) for i, n in enumerate([4, 5, 1, 30, 2, 8])]
    assert lengths(split_shards(plan, 10)) == [[4, 5, 1], [30], [2, 8]]
    assert lengths(split_shards(plan, 1)) == [[4], [5], [1], [30], [2], [8]]
    assert lengths(split_shards(plan, 99)) == [[4, 5, 1, 30, 2, 8]]


def test_what_is_unfinished_or_foreign_is_refused(tmp_path: Path):
    writer = ShardWriter(tmp_path, plan_of(TENSORS), BIG)
    table = TENSORS["wte.weight"]
    with pytest.raises(RunError, match="one of the plan"):
        writer.write("lm_head.weight", table)
    with pytest.raises(RunError, match=r"shape of wte\.weight: expected \[50, 16\]"):
        writer.write("wte.weight", table[:5])
    with pytest.raises(RunError, match=r"dtype of wte\.weight: expected F16, got F32"):
        writer.write("wte.weight", table.float())
    writer.write_rows("wte.weight", 0, table[:20])
    for start in (19, 0):
        with pytest.raises(RunError, match="twice"):
            writer.write_rows("wte.weight", start, table[:20])
    with pytest.raises(RunError, match="twice"):
        writer.write("wte.weight", table)
    with pytest.raises(RunError, match="within 0 to 50"):
        writer.write_rows("wte.weight", 40, table[:20])
    with pytest.raises(RunError, match=r"rows of wte\.weight"):
        writer.write_rows("wte.weight", 20, table[:5, :4])
    with pytest.raises(RunError, match="rows of flag"):
        writer.write_rows("flag", 0, TENSORS["flag"])
    with pytest.raises(
        RunError, match=r"wte\.weight \(\d of 6 incomplete\).*50 rows.*rows 0 to 20"
    ):
        for name in list(TENSORS)[1:3]:
            writer.write(name, TENSORS[name])
        writer.write_rows("wte.weight", 20, table[20:20])
        writer.write("flag", TENSORS["flag"])
        writer.write("h.0.bias", TENSORS["h.0.bias"])
        writer.close()
    writer.write_rows("wte.weight", 20, table[20:])
    assert writer.close() == (WEIGHTS,)
    with pytest.raises(RunError, match="closed"):
        writer.write("flag", TENSORS["flag"])
    with pytest.raises(TargetError, match="File exists"):
        ShardWriter(tmp_path, plan_of(TENSORS), BIG)
    with pytest.raises(RunError, match="once, got twice"):
        ShardWriter(tmp_path, plan_of(TENSORS) * 2, 1)


def test_an_exception_leaves_no_open_file_and_no_index(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, plan_of(TENSORS), 100):
        raise KeyboardInterrupt
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / INDEX).exists()


def test_modes_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        with ShardWriter(tmp_path, plan_of({"a": torch.ones(9), "b": torch.ones(9)}), 40) as writer:
            writer.write("a", torch.ones(9))
            writer.write("b", torch.ones(9))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o640}


def test_a_full_disk_shows_before_anything_is_written(tmp_path: Path, monkeypatch):
    def full(handle: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TargetError, match=r"No space left.*Free room"):
        ShardWriter(tmp_path, plan_of(TENSORS), BIG)


def test_file_systems_that_cannot_reserve_still_work(tmp_path: Path, monkeypatch):
    def cannot(handle: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    with ShardWriter(tmp_path, plan_of(TENSORS), BIG) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["wte.weight"], TENSORS["wte.weight"])


def test_writing_does_not_need_the_memory_of_a_shard(tmp_path: Path):
    psutil = pytest.importorskip("psutil")
    piece = torch.zeros((1 << 10, 1 << 10))
    plan = [TensorPlan(f"t{i}", dtype_name(piece.dtype), tuple(piece.shape)) for i in range(48)]
    process = psutil.Process()
    with ShardWriter(tmp_path, plan, BIG) as writer:
        writer.write("t0", piece)
        writer.write("t1", piece.t())  # code and buffers are loaded once
        before = peak = process.memory_info().rss
        for i in range(2, 48):
            writer.write(f"t{i}", piece if i % 2 else piece.t())
            peak = max(peak, process.memory_info().rss)
    assert peak - before < 12 * piece.nbytes  # allocators keep a few pieces
