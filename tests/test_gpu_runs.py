"""Whole runs on a GPU: a real one, or its stand-in (`gpu_stand_in.py`, `test_gpu_stand_in.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import gpu_stand_in
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_convert import TOKENS, make, native_checkpoint, plain_weights
from test_mixtures import source as mixture
from test_resume import stop_after

import qquant.convert as convert
from qquant import QuantSpec, batching, quantize, spec_from_recipe
from qquant.budget import SLACK, Room, memory_needs
from qquant.calibration.hold import Holder
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.errors import RunError
from qquant.events import Event, Resumed, Warned
from qquant.models.families import family_of
from qquant.models.shapes import Shapes
from qquant.place import Place
from qquant.profiling import profile_models
from qquant.protocol import Protocol
from qquant.reporting import png
from qquant.result import Result
from qquant.runtime import load
from qquant.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SPEC = QuantSpec(group_size=32)
MANY = torch.randint(0, 256, (48, 24), generator=torch.Generator().manual_seed(0))
DEVICES = ("cpu", "cuda")
IDS = torch.arange(40).view(2, 20)
MIB = 1 << 20
ON_HOST = Room(1 << 40)


def run(src: Path, dst: Path, spec: QuantSpec = SPEC, **more: Any) -> tuple[Result, list[Event]]:
    events: list[Event] = []

    def see(event: Event) -> None:
        events.append(event)
        watch(event)

    watch = more.pop("watch", lambda _: None)
    more = {"device": "cuda", "compute_dtype": "float32", "tokens": TOKENS} | more
    return quantize(src, dst, spec, progress=see, **more), events


def wait_in(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    """Waiting activations are kept there, whatever memory there is."""
    monkeypatch.setattr(convert, "make_holder", lambda *_, **__: Holder(**vars(room)))


def tensors(result: Result) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for file in sorted(result.path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples each, where one would hold them all; the same on a CPU and a GPU."""
    for sizes, device in product((batching.TOKENS_PER_UNIT, batching.TOKENS_PER_BATCH), DEVICES):
        monkeypatch.setitem(sizes, device, 2 * TOKENS.shape[1])


def test_devices_are_not_mixed() -> None:
    """What the other tests rely on, of a GPU and of its stand-in."""
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
    index = torch.zeros(1, dtype=torch.int64)
    four = [t.view(1, 1, 2, 2) for t in (here, there)]
    mixed: list[Callable[[], object]] = [
        lambda: here + there,
        lambda: there @ here,
        lambda: torch.cat([here, there]),
        lambda: here[index.cuda()],
        lambda: there.index_put_((index,), here[:1]),
        lambda: torch.nn.functional.scaled_dot_product_attention(four[1], four[0], four[0]),
    ]
    for each in mixed:
        with pytest.raises((RuntimeError, IndexError)):
            each()
    with pytest.raises(TypeError):
        there.numpy()
    assert there[index].is_cuda and (there + torch.tensor(1.0)).is_cuda


@pytest.mark.parametrize("recipe", ["default", "fast", "qwen", "best"])
@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3"])
def test_it_finds_what_a_cpu_finds(
    kind: str, recipe: str, tmp_path: Path, small_batches: None
) -> None:
    src, spec = make(kind, tmp_path / "src"), spec_from_recipe(recipe, group_size=32)
    there, _ = run(src, tmp_path / "there", spec, tokens=MANY)
    here, _ = run(src, tmp_path / "here", spec, tokens=MANY, device="cpu")
    assert there.device == "cuda:0" and there.device_peak_bytes and there.columns
    assert verify(there.path).ok and not there.flops
    for a, b in zip(there.layers, here.layers, strict=True):
        assert a.name == b.name and a.damp == b.damp and a.flags == b.flags
        # A code that falls on the other side of a tie changes all that follow it.
        assert a.rel_error == pytest.approx(b.rel_error, rel=0.2)
    sums = [sum(layer.rel_error for layer in made.layers) for made in (there, here)]
    assert sums[0] == pytest.approx(sums[1], rel=0.03)
    ours, cpus, source = (plain_weights(p) for p in (there.path, here.path, src))
    for name in source:
        lost = [float((made[name] - source[name]).norm()) for made in (ours, cpus)]
        assert lost[0] == pytest.approx(lost[1], rel=0.1), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits(dtype: str, tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    there, _ = run(src, tmp_path / "there", compute_dtype=dtype)
    here, _ = run(src, tmp_path / "here", device="cpu")
    for a, b in zip(there.layers, here.layers, strict=True):
        assert a.rel_error == pytest.approx(b.rel_error, rel=0.2)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_mixtures(kind: str, tmp_path: Path) -> None:
    src = mixture(tmp_path / "src", kind)
    there, _ = run(src, tmp_path / "there")
    here, _ = run(src, tmp_path / "here", device="cpu")
    assert verify(there.path).ok
    for a, b in zip(there.layers, here.layers, strict=True):
        assert a.name == b.name and a.rel_error == pytest.approx(b.rel_error, rel=0.2)
    report = load(there.path, device="cuda", dtype="float32").model(IDS.cuda()).logits.cpu()
    again = load(there.path, device="cpu", dtype="float32").model(IDS).logits
    assert (report - again).norm() < 1e-3 * again.norm()


@pytest.mark.parametrize("recipe", ["default", "fast"])
def test_where_activations_wait_changes_nothing(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    """On the device, in host memory, in a file; and some here, some there."""
    src, spec = make("qwen2", tmp_path / "src"), spec_from_recipe(recipe, group_size=32)
    plain, _ = run(src, tmp_path / "plain", spec)
    rooms = {
        "host": ON_HOST,
        "some": Room(20_000, 20_000, False, False),
        "file": Room(0, 0, False, True),
        "device": Room(0, 1 << 40, True, False),
        "again": Room(1 << 40, recompute_from=0),
        "some again": Room(20_000, 100_000, recompute_from=100_000),
    }
    for name, room in rooms.items():
        wait_in(monkeypatch, room)
        made, _ = run(src, tmp_path / name, spec)
        assert tensors(made) == tensors(plain), name
        assert bool(made.spilled_bytes) == (name in ("some", "file"))
        assert (made.recomputed > 0) == ("again" in name)


@pytest.mark.parametrize("recipe", ["default", "qwen"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_memory_at_work_was_foreseen(
    kind: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing waiting on the device, that is what a run takes there."""
    wide = {"hidden_size": 256, "num_key_value_heads": 4}
    if kind == "qwen2":
        src = native_checkpoint(tmp_path / "src", kind, intermediate_size=1024, **wide)
    else:
        src = mixture(tmp_path / "src", kind, moe_intermediate_size=384, **wide)
    spec = spec_from_recipe(recipe, group_size=32)
    tokens = torch.randint(0, 256, (32, 512), generator=torch.Generator().manual_seed(0))
    source = Checkpoint.open(src)
    shapes, place = Shapes.of(source, family_of(source.config)), Place("cuda:0", "float32")
    needs = memory_needs(shapes, spec, place, *tokens.shape)
    wait_in(monkeypatch, ON_HOST)
    before = torch.cuda.memory_allocated()
    made, _ = run(src, tmp_path / "dst", spec, tokens=tokens)
    assert made.device_peak_bytes is not None
    most = made.device_peak_bytes - before
    libraries = 0 if torch.cuda.get_device_name() == gpu_stand_in.NAME else SLACK
    assert (0.2 if kind == "qwen3_moe" else 0.4) * needs.at_work < most
    assert most <= needs.at_work + libraries


def test_a_limit_that_is_too_low_says_what_would_do(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    with pytest.raises(Exception, match=r"--gpu-memory: expected at least"):
        run(src, tmp_path / "dst", gpu_memory=MIB)
    made, _ = run(src, tmp_path / "dst", gpu_memory=1 << 30)
    assert made.device_peak_bytes and made.device_peak_bytes < 1 << 30


def test_it_goes_on_where_it_stopped(tmp_path: Path, small_batches: None) -> None:
    src = make("qwen2", tmp_path / "src")
    plain, _ = run(src, tmp_path / "plain")
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "dst", watch=stop_after(0))
    made, events = run(src, tmp_path / "dst")
    assert made.resumed == 1 and any(isinstance(e, Resumed) for e in events)
    assert tensors(made) == tensors(plain)


def test_memory_that_runs_out_is_got_along_with(tmp_path: Path, monkeypatch: Any) -> None:
    """Batches become smaller, and what waits goes to the host; the bytes are the same."""
    if torch.cuda.get_device_name() != gpu_stand_in.NAME:
        pytest.skip("only the stand-in's memory can be limited")
    memory = gpu_stand_in.install()
    tokens = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(0))
    unit = 2 * tokens.shape[1]
    monkeypatch.setitem(batching.TOKENS_PER_UNIT, "cuda", unit)
    src = make("qwen2", tmp_path / "src")
    held = memory.in_use()

    def most(name: str) -> tuple[Result, int]:
        memory.reset()
        made, _ = run(src, tmp_path / name, tokens=tokens)
        return made, memory.most() - held

    plain, large = most("plain")
    with monkeypatch.context() as patched:
        patched.setitem(batching.TOKENS_PER_BATCH, "cuda", unit)
        wait_in(patched, ON_HOST)
        _, small = most("small")
    assert small < 0.8 * large
    try:
        memory.limit(held + (large + small) // 2)
        made, events = run(src, tmp_path / "dst", tokens=tokens)
        said = [e.text for e in events if isinstance(e, Warned)]
        assert any("Out of memory on cuda:0: going on from block" in text for text in said), said
        assert tensors(made) == tensors(plain)
        memory.limit(held + small // 2)
        with pytest.raises(RunError, match=r"memory of cuda:0: expected room for the smallest"):
            run(src, tmp_path / "none", tokens=tokens)
        assert not (tmp_path / "none").exists()
    finally:
        memory.limit(0)


def test_bits_by_measured_loss(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    spec = QuantSpec(group_size=32, target_bpw=4.5)
    there, _ = run(src, tmp_path / "there", spec)
    here, _ = run(src, tmp_path / "here", spec, device="cpu")
    assert there.mixed is not None and here.mixed is not None
    for a, b in zip(there.mixed.units, here.mixed.units, strict=True):
        assert dict(a.loss) == pytest.approx(dict(b.loss), rel=0.05)


# Its kernel runs on a real GPU, or interpreted, where `-k kernels_on_a_gpu` finds it.
HAS_TRITON = bool(find_spec("triton")) and (
    torch.version.cuda is not None or os.environ.get("TRITON_INTERPRET") == "1"
)
TRITON = [pytest.param("triton-int4", 4, id="kernels_on_a_gpu")]


@pytest.mark.parametrize(
    ("kernel", "bits"),
    [
        ("torch-int4", 4),
        *product(("auto", "dequantize", "dense"), (2, 3, 4, 8)),
        *(TRITON if HAS_TRITON else []),
    ],
)
def test_loaded(kernel: str, bits: int, tmp_path: Path) -> None:
    """Under `auto` in the dtype of its own choice: float32 asked for is exact and tries none."""
    src = make("qwen2", tmp_path / "src")
    where = "cpu" if kernel == "triton-int4" else "cuda"  # interpreted, a solve takes minutes
    made, _ = run(src, tmp_path / "dst", QuantSpec(bits=bits, group_size=32), device=where)
    want = load(made.path, device="cpu", dtype="float32", kernel="dense").model(IDS).logits
    # The interpreter's product takes no bfloat16, which Triton's kernel makes of float32.
    dtype = {"auto": None, "triton-int4": "float16"}.get(kernel, "float32")
    loaded = load(made.path, device="cuda", dtype=dtype, kernel=kernel)
    tried = loaded.kernel.tried
    assert bool(tried) is (kernel == "auto")
    if kernel == "auto":
        assert {best for best, _ in tried.values()} == set(loaded.kernel.counts)
        assert all("dequantize: " in said and " us" in said for _, said in tried.values())
    else:
        assert set(loaded.kernel.counts) == {kernel}
    for ids in (IDS, IDS[:1, :1]):
        got = loaded.model(ids.cuda()).logits
        assert got.is_cuda
        wanted = want[: ids.shape[0], : ids.shape[1]]
        assert (got.cpu() - wanted).norm() < 0.02 * wanted.norm()
    generated = loaded.model.generate(IDS[:1].cuda(), max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, 25) and generated.is_cuda
    loaded.model.cpu()
    for ids in (IDS, IDS[:1, :1]):
        wanted = want[: ids.shape[0], : ids.shape[1]]
        assert (loaded.model(ids).logits - wanted).norm() < 0.02 * wanted.norm()


def test_original_qwen_generates(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    made, _ = run(src, tmp_path / "dst")
    said = []
    for device in ("cuda", "cpu"):
        model = load(made.path, device=device, dtype="float32", kernel="dequantize").model
        ids = IDS[:1].to(device)
        said.append(model.generate(ids, max_new_tokens=5, do_sample=False).tolist())
    assert said[0] == said[1]


def test_calibrated_on_what_the_model_says(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    more = ["--calib", "self", "--samples", "4", "--seqlen", "24", "--group-size", "32"]
    done = CliRunner().invoke(
        cli, ["quantize", str(src), "-o", str(tmp_path / "dst"), "--device", "cuda", *more]
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "dst" / "qquant_manifest.json").read_text())
    assert manifest["machine"]["device"] == "cuda:0"
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "dst"), "--against", str(src)])
    assert done.exit_code == 0, done.output


def test_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How near it is to the original; speed and memory: `benchmarks/gpu.py`."""
    monkeypatch.setattr(png, "draw", lambda chart: b"PNG")
    src = make("qwen", tmp_path / "src")
    made, _ = run(src, tmp_path / "dst")
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it rests. " * 40)
    quick: dict[str, Any] = {"seqlen": 24, "max_tokens": 240, "speed": ("none",)}
    found = profile_models(
        [str(made.path)],
        tmp_path / "profile",
        against=str(src),
        device="cuda",
        protocol=Protocol.of(texts=(str(text),), memory=("none",), **quick),
    )
    assert "failed" not in found, found["failed"]
    assert found["machine"]["gpu"]["name"] == torch.cuda.get_device_name()
    near = found["models"]["dst"]["accuracy"]["domains"]["fox.txt"]
    assert 0 < near["kl"][0] < 1 and found["models"]["dst"]["layers"]
