"""Reading a directory: right tensors from good ones, one clear refusal from every broken one."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qquant.checkpoint import Checkpoint
from qquant.directory import CONFIG, INDEX, WEIGHTS, sha256_file, sha256_files
from qquant.errors import CheckpointError
from qquant.headers import TensorPlan, dtype_name, encode_header, parse_header, read_header

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "model.embed_tokens.weight": torch.randn((40, 8), generator=GENERATOR).bfloat16(),
    "model.layers.0.mlp.up_proj.weight": torch.randn((16, 8), generator=GENERATOR).bfloat16(),
    "model.layers.1.mlp.up_proj.weight": torch.randn((16, 8), generator=GENERATOR).half(),
    "model.norm.weight": torch.randn((8,), generator=GENERATOR),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros((0, 4), dtype=torch.float16),
}
SHARDS = {
    "model-00001-of-00002.safetensors": ["model.embed_tokens.weight", "scalar", "empty"],
    "model-00002-of-00002.safetensors": [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ],
}
FIRST, SECOND = SHARDS


def write_single(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, root / WEIGHTS, {"format": "pt"})
    (root / CONFIG).write_text(json.dumps({"model_type": "qwen2"}))
    return root


def write_sharded(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for file, names in SHARDS.items():
        save_file({n: TENSORS[n] for n in names}, root / file, {"format": "pt"})
    weight_map = {n: file for file, names in SHARDS.items() for n in names}
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / CONFIG).write_text(json.dumps({"model_type": "qwen2"}))
    return root


def change_index(root: Path, **weight_map: str) -> None:
    index = json.loads((root / INDEX).read_text())
    index["weight_map"].update(weight_map)
    (root / INDEX).write_text(json.dumps(index))


def refused(path: str | Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(path)
    return caught.value


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_tensor_is_read_exactly(tmp_path: Path, write):
    checkpoint = Checkpoint.open(write(tmp_path / "m"))
    assert checkpoint.config == {"model_type": "qwen2"}
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(got, tensor)
    assert torch.equal(
        checkpoint.read_rows("model.embed_tokens.weight", 3, 9),
        TENSORS["model.embed_tokens.weight"][3:9],
    )
    assert checkpoint.read_rows("empty", 0, 0).shape == (0, 4)
    assert checkpoint.nbytes == sum(t.nbytes for t in TENSORS.values())
    info = checkpoint.tensors["model.norm.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (8,), 32)
    with pytest.raises(IndexError):
        checkpoint.read_rows("model.norm.weight", 0, 9)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")


def test_what_is_read_is_ones_own(tmp_path: Path):
    checkpoint = Checkpoint.open(write_single(tmp_path))
    before = sha256_file(tmp_path / WEIGHTS)
    checkpoint.read("model.norm.weight").zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), TENSORS["model.norm.weight"])
    assert sha256_file(tmp_path / WEIGHTS) == before


def test_files_hashed_together_have_their_own_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [tmp_path / str(i) for i in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    for cores in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert sha256_files(paths) == {path: sha256_file(path) for path in paths}
    assert sha256_files([]) == {}
    with pytest.raises(FileNotFoundError):
        sha256_files([*paths, tmp_path / "gone"])


def test_files_and_hash_follow_contents_not_place(tmp_path: Path):
    one = Checkpoint.open(write_sharded(tmp_path / "a"))
    two = Checkpoint.open(write_sharded(tmp_path / "elsewhere"))
    assert one.files == (CONFIG, INDEX, FIRST, SECOND)
    assert one.sha256() == two.sha256()
    with (two.path / SECOND).open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x7f")
    assert one.sha256() != two.sha256()


def test_a_repository_name_gets_the_download_command(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("Qwen/Qwen-7B-Chat", "nothing there")
    assert "hf download Qwen/Qwen-7B-Chat --local-dir Qwen-7B-Chat" in str(error)
    assert "hf download" not in str(refused(tmp_path / "missing", "nothing there"))
    (tmp_path / "file").write_text("x")
    assert str(tmp_path) in str(refused(tmp_path / "file", "got a file"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, r"config\.json.*expected a file, got nothing"),
        ("{", r"config\.json.*expected JSON"),
        ("[1]", r"config\.json.*expected a JSON object, got list"),
        ("[" * 100_000, r"config\.json.*expected JSON"),
        (b"\xff\xfe\x00", r"config\.json.*expected JSON"),
    ],
)
def test_broken_config(tmp_path: Path, text: str | bytes | None, match: str):
    write_single(tmp_path)
    (tmp_path / CONFIG).unlink()
    if text is not None:
        (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, match)


def test_missing_weights_say_what_to_do(tmp_path: Path):
    (tmp_path / CONFIG).write_text("{}")
    refused(tmp_path, "got neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "never unpickles" in str(refused(tmp_path, r"pytorch_model\.bin"))
    save_file(TENSORS, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert f"rename it to {WEIGHTS}" in str(refused(tmp_path, "gptq_model-4bit"))
    (tmp_path / "gptq_model-4bit-128g.safetensors").rename(tmp_path / FIRST)
    assert f"{INDEX} is missing" in str(refused(tmp_path, "model-00001"))


def test_broken_index(tmp_path: Path):
    write_sharded(tmp_path)
    good = (tmp_path / INDEX).read_text()
    for text, match in [
        ("{", "expected JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "unpickles"),
    ]:
        (tmp_path / INDEX).write_text(text)
        refused(tmp_path, match)
    (tmp_path / INDEX).write_text(good)
    change_index(tmp_path, scalar=SECOND)
    refused(tmp_path, f"tensor scalar: expected in {SECOND}")
    (tmp_path / INDEX).write_text(good)
    (tmp_path / SECOND).unlink()
    refused(tmp_path, rf"{SECOND}.*nothing there.*Download")


def test_two_sets_of_weights_are_refused(tmp_path: Path):
    write_sharded(tmp_path)
    save_file(TENSORS, tmp_path / WEIGHTS)
    refused(tmp_path, "both, and readers differ")
    weight_map = {"weight_map": dict.fromkeys(TENSORS, WEIGHTS)}
    (tmp_path / INDEX).write_text(json.dumps(weight_map))
    assert Checkpoint.open(tmp_path).files == (CONFIG, INDEX, WEIGHTS)


@pytest.mark.parametrize(
    "name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"]
)
def test_an_index_may_not_leave_the_directory(tmp_path: Path, name: str):
    write_sharded(tmp_path / "m")
    save_file({"scalar": TENSORS["scalar"]}, tmp_path / "x.safetensors")
    change_index(tmp_path / "m", scalar=name)
    refused(tmp_path / "m", r"name within the directory.*who made it")


def test_links(tmp_path: Path):
    outside = write_single(tmp_path / "outside")
    model = write_single(tmp_path / "model")
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(outside / WEIGHTS)
    refused(model, "a link to .*outside")
    (model / WEIGHTS).unlink()
    os.link(outside / WEIGHTS, model / WEIGHTS)
    Checkpoint.open(model)
    (model / WEIGHTS).rename(model / "blob")
    (model / WEIGHTS).symlink_to("blob")
    Checkpoint.open(model)
    (tmp_path / "name").symlink_to(model)
    assert Checkpoint.open(tmp_path / "name").path == model.resolve()
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(WEIGHTS)
    refused(model, "expected a file")


def test_the_hub_cache_is_read_and_no_other_link_out(tmp_path: Path):
    repository = tmp_path / "models--Qwen--Qwen"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    write_single(blobs)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (blobs / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-{name}")
    assert torch.equal(Checkpoint.open(snapshot).read("scalar"), TENSORS["scalar"])
    other = write_single(tmp_path / "models--Other" / "blobs")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(other / WEIGHTS)
    refused(snapshot, "a link to .*Other")


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_shard_is_found_on_opening(tmp_path: Path, keep: int):
    write_sharded(tmp_path)
    data = (tmp_path / SECOND).read_bytes()
    (tmp_path / SECOND).write_bytes(data[:keep])
    error = refused(tmp_path, SECOND)
    assert "Download the file again" in str(error)
    if keep == -1:
        assert "truncated in model." in str(error)
    partial, problems = Checkpoint.examine(tmp_path)
    assert len(problems) == 1 and set(partial.tensors) == set(SHARDS[FIRST])


def test_bytes_after_the_end_are_refused(tmp_path: Path):
    write_single(tmp_path)
    with (tmp_path / WEIGHTS).open("ab") as handle:
        handle.write(b"\0")
    refused(tmp_path, "bytes after the last tensor")


def test_a_git_lfs_pointer_is_named(tmp_path: Path):
    write_single(tmp_path)
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in str(refused(tmp_path, "header"))


def test_a_file_that_shrinks_after_opening(tmp_path: Path):
    write_single(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 600)
    with pytest.raises(CheckpointError, match="become shorter"):
        for name in TENSORS:
            checkpoint.read(name)


def test_a_pipe_does_not_hang(tmp_path: Path):
    write_single(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    refused(tmp_path, "expected a file")


def header(**changes: object) -> bytes:
    entry = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]} | changes
    return json.dumps({"t": entry}).encode()


@pytest.mark.parametrize(
    ("raw", "data", "match"),
    [
        (header(), 11, "truncated in t: expected 12 bytes of data, got 11"),
        (header(), 13, "bytes after the last tensor"),
        (header(dtype="F4"), 12, "dtype of t: expected one of"),
        (header(dtype=["F16"]), 12, "dtype of t"),
        (header(shape=[2, -3]), 12, "shape of t"),
        (header(shape=[2, True]), 12, "shape of t"),
        (header(shape=[2.0, 3]), 12, "shape of t"),
        (header(shape=6), 12, "shape of t"),
        (header(shape=[1] * 65), 12, "shape of t"),
        (header(shape=[10**40, 10**40]), 12, "a number of more than 30 digits, got 12"),
        (header(shape=[2, 4]), 12, "bytes of t .*expected 16, got 12"),
        (header(data_offsets=[12, 0]), 12, "bytes of t .*got -12"),
        (header(data_offsets=[0, 12, 24]), 12, "data_offsets of t"),
        (header(data_offsets=[-12, 0]), 12, "data_offsets of t"),
        (header(data_offsets=[4, 16]), 16, "a hole at 4"),
        (header(extra=1), 12, "dtype, shape and data_offsets"),
        (b'{"t": 1}', 12, "tensor t"),
        (b'{"__metadata__": {"a": 1}}', 0, "strings only"),
        (b'{"__metadata__": []}', 0, "strings only"),
        (b"[]", 0, "JSON object"),
        (b" {}", 0, "JSON object"),
        (b"", 0, "JSON object"),
        (b"{\xff}", 0, "expected JSON"),
        (b'{"t":' * 100_000, 0, "expected JSON"),
        (b'{"a": 1, "a": 1}', 0, "a is there twice"),
        (b'{"\\ud800": 1}', 0, "tensor's name"),
    ],
)
def test_headers_that_lie(raw: bytes, data: int, match: str):
    with pytest.raises(CheckpointError, match=match):
        parse_header(raw, data, "f.safetensors")


def test_overlapping_tensors_are_refused():
    entry = {"dtype": "U8", "shape": [8]}
    raw = {"a": entry | {"data_offsets": [0, 8]}, "b": entry | {"data_offsets": [4, 12]}}
    with pytest.raises(CheckpointError, match="data of b: expected from byte 8, got an overlap"):
        parse_header(json.dumps(raw).encode(), 12, "f")


def test_a_written_header_is_the_librarys(tmp_path: Path):
    """Byte for byte, with every dtype, so that both order tensors alike."""
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e5m2,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        torch.int16,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint32,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint64,
    ]
    tensors = {f"{'zyx'[i % 3]}.{i}": torch.zeros((i, 2), dtype=d) for i, d in enumerate(dtypes)}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    raw = (tmp_path / WEIGHTS).read_bytes()
    plan = [TensorPlan(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    start, infos = encode_header(plan, {"format": "pt"}, WEIGHTS)
    assert raw.startswith(start)
    assert read_header(tmp_path / WEIGHTS).tensors == infos
    assert infos[-1].end == len(raw)


CORRUPT = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(data=st.data())
@CORRUPT
def test_random_damage_is_refused_or_harmless(tmp_path: Path, data: st.DataObject):
    """What opens holds what the library reads from the same bytes; nothing else is raised."""
    write_single(tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 8 + length - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            damaged[at % len(damaged)] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del damaged[at : at + data.draw(st.integers(1, 8))]
        else:
            del damaged[data.draw(st.integers(9, max(10, len(damaged) - 1))) :]
    (tmp_path / WEIGHTS).write_bytes(damaged)
    try:
        checkpoint = Checkpoint.open(tmp_path)
    except CheckpointError as error:
        assert WEIGHTS in str(error)
        return
    expected = load_file(tmp_path / WEIGHTS)
    assert set(expected) == set(checkpoint.tensors)
    for name, tensor in expected.items():
        got = checkpoint.read(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert got.view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "I32", "U8", "F6_E2M3"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**70), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | JSON,
    }
)


@given(
    entries=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4),
    size=st.integers(0, 2**70),
)
@example(entries={"": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, size=1)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_json_is_a_header_or_a_checkpoint_error(entries: dict[str, object], size: int):
    try:
        header = parse_header(json.dumps(entries).encode(), size, "f")
    except CheckpointError as error:
        assert str(error).startswith("f: ")
        return
    at = 0
    base = min((t.start for t in header.tensors), default=0)
    for info in header.tensors:
        assert info.start - base == at
        at += info.numel * info.torch_dtype.itemsize
    assert at == size


@given(st.dictionaries(st.text(max_size=6), st.text(max_size=20) | JSON, max_size=4))
@CORRUPT
def test_any_index_is_refused_or_right(tmp_path: Path, weight_map: dict[str, object]):
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)


def test_quantization_config_is_found_wherever_it_is(tmp_path: Path):
    write_single(tmp_path)
    assert Checkpoint.open(tmp_path).quantization_config is None
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert Checkpoint.open(tmp_path).quantization_config == {"bits": 4}
    (tmp_path / CONFIG).write_text('{"quantization_config": {"bits": 8}}')
    assert Checkpoint.open(tmp_path).quantization_config == {"bits": 8}
    (tmp_path / CONFIG).write_text('{"quantization_config": 4}')
    with pytest.raises(CheckpointError, match="expected an object, got int"):
        _ = Checkpoint.open(tmp_path).quantization_config


def test_reading_keeps_nothing_resident(tmp_path: Path):
    """A shard of 256 MB read in 64 pieces: the process grows by a few pieces at the most."""
    psutil = pytest.importorskip("psutil")
    (tmp_path / CONFIG).write_text("{}")
    piece = torch.zeros(1 << 20)
    save_file({f"t{i}": piece.clone() for i in range(64)}, tmp_path / WEIGHTS)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("t0")
    process = psutil.Process()
    before = peak = process.memory_info().rss
    for i in range(64):
        checkpoint.read(f"t{i}")
        peak = max(peak, process.memory_info().rss)
    assert peak - before < 12 * piece.nbytes  # allocators keep a few pieces


def test_the_golden_checkpoint_opens_as_the_library_reads_it():
    root = Path(__file__).parent / "golden" / "qwen1-tiny"
    if not (root / CONFIG).is_file():
        pytest.skip("tests/golden/qwen1-tiny is not in this tree")
    checkpoint = Checkpoint.open(root)
    with safe_open(root / WEIGHTS, framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name in checkpoint.tensors:
            assert torch.equal(file.get_tensor(name), checkpoint.read(name))
