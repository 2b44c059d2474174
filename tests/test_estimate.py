"""What a run is said to take is what it takes; limits on memory are kept or refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_convert import SPEC, TOKENS, make, native_checkpoint

import qquant.budget as budget
import qquant.estimate as estimate_module
import qquant.gptq as gptq
import qquant.host as host
import qquant.measured as measured
import qquant.pace as pace
import qquant.place as place
from qquant import (
    CalibrationSpec,
    OutputSpec,
    QuantSpec,
    quantize,
    sensitivity,
    spec_from_recipe,
)
from qquant.budget import (
    MeasuringNeeds,
    MemoryNeeds,
    Room,
    find_room,
    make_holder,
    memory_needs,
)
from qquant.calibration.hold import Holder
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.costs import Costs
from qquant.devices import choose_compute, choose_device
from qquant.errors import CalibrationError, SpecError, TargetError
from qquant.estimate import dry_run
from qquant.host import cpu_multiplies_bfloat16
from qquant.models.families import family_of
from qquant.models.shapes import Shapes, held_dtype
from qquant.models.skeleton import Skeleton
from qquant.place import Place, find_place
from qquant.sizes import foresee

CALIB = CalibrationSpec(samples=12, seqlen=24)
CPU = Place("cpu", "float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen", tmp_path_factory.mktemp("estimate") / "src")


@pytest.mark.parametrize(
    "spec", [SPEC, QuantSpec(bits=3, group_size=32), QuantSpec(bits=8, group_size=64)]
)
def test_sizes_are_those_of_the_files(tmp_path: Path, spec: QuantSpec) -> None:
    src = native_checkpoint(tmp_path / "src", "qwen2", hidden_size=128, intermediate_size=256)
    said = dry_run(src, spec, CALIB, device="cpu")
    made = quantize(src, tmp_path / "dst", spec, CALIB, tokens=TOKENS, device="cpu")
    written = (made.path / "model.safetensors").stat().st_size
    header = int.from_bytes((made.path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert said.output_bytes == written - header
    assert said.linears == len(made.layers) and said.blocks == 2
    assert said.calibration_tokens == TOKENS.numel() and said.widest == 256
    assert said.output_bytes < said.disk_bytes


def test_nothing_is_written_and_no_weight_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qquant.checkpoint import Checkpoint

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    before = sorted(p for p in source.parent.rglob("*"))
    monkeypatch.setattr(Checkpoint, "_bytes", read)
    said = dry_run(source, SPEC, CALIB, device="cpu")
    assert set(said.seconds) == {"set-up", "forward", "hessian", "solve", "write and verify"}
    assert all(value > 0 for value in said.seconds.values())
    assert sorted(p for p in source.parent.rglob("*")) == before


def test_more_work_takes_longer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates in the same terms: tokens count in the forward and the Hessian, not in solves."""
    steady = pace.Pace(product=1e-11, element=1e-10, call=1e-6, threads=2)
    monkeypatch.setattr(pace.Pace, "measure", lambda *_: steady)
    # Other dtypes are measured at each run, and no two measurements are the same.
    plain = {"device": "cpu", "compute_dtype": "float32"}
    few = dry_run(source, SPEC, CalibrationSpec(samples=84, seqlen=24), **plain)
    many = dry_run(source, SPEC, CalibrationSpec(samples=8400, seqlen=24), **plain)
    for part in ("forward", "hessian"):
        assert many.seconds[part] == pytest.approx(100 * few.seconds[part])
    assert many.seconds["solve"] == few.seconds["solve"]
    assert many.waiting_bytes == 100 * few.waiting_bytes
    rounded = dry_run(source, QuantSpec(method="rtn", group_size=32), CALIB, device="cpu")
    assert "forward" not in rounded.seconds and rounded.calibration_tokens == 0


def test_a_run_does_not_foresee_what_is_behind_it(source: Path, tmp_path: Path) -> None:
    plain = {"device": "cpu", "compute_dtype": "float32"}
    made = quantize(source, tmp_path / "dst", SPEC, CALIB, tokens=TOKENS, **plain)
    assert made.foreseen is not None and made.foreseen.seconds["set-up"] == 0
    assert dry_run(source, SPEC, CALIB, **plain).seconds["set-up"] > 0


def test_the_fit_recovers_a_cost() -> None:
    cost = np.array([0.3, 0.0, 2.0, 0.5])
    shapes = [(64, 256), (512, 256), (64, 640), (512, 640), (1024, 384)]
    rows = np.array([measured._terms(n, k) for n, k in shapes])
    assert np.allclose(measured._fit(rows, rows @ cost), cost, atol=1e-6)


def without_torch(*words: str) -> str:
    """What the command prints in a process that could not import torch or transformers."""
    script = (
        "import sys; sys.modules.update(torch=None, transformers=None); "
        f"from qquant.cli import cli; cli({list(words)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_the_estimate_of_memory_is_near_the_peak(tmp_path: Path) -> None:
    """Within a quarter, the dry run without torch and the run in a process of its own."""
    src = native_checkpoint(
        tmp_path / "src", "qwen2", hidden_size=512, intermediate_size=2048, head_dim=64,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    asked = ("--samples", "16", "--seqlen", "128", "--device", "cpu", "--compute-dtype", "float32")
    dst = str(tmp_path / "dst")
    told = without_torch("quantize", str(src), "-o", dst, "--dry-run", "--log-json", *asked)
    script = (
        "import sys, torch\n"
        "from qquant import QuantSpec, budget, quantize\n"
        "torch.set_num_threads(1)\n"
        "base = []\n"
        "left = budget.available_memory\n"
        "budget.available_memory = lambda: base.append(budget.resident_bytes()) or left()\n"
        "ids = torch.randint(0, 256, (16, 128))\n"
        "made = quantize(sys.argv[1], sys.argv[2], QuantSpec(), tokens=ids, device='cpu',"
        " compute_dtype='float32')\n"
        "print(base[0], made.peak_bytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(src), dst], capture_output=True, text=True, check=True
    )
    base, peak = map(int, done.stdout.split())
    said = json.loads(told)["host_bytes"]
    assert abs(said - peak) <= 0.25 * peak, (base, said, peak)
    foreseen = budget.PROCESS + (budget._HQQ if find_spec("hqq") else 0)
    foreseen += budget._CUDA if torch.version.cuda else 0
    assert abs(foreseen - base) < 80 << 20, base


def test_a_span_is_the_solvers() -> None:
    """`budget` has its own copy, since the solver imports torch."""
    assert budget._SPAN == gptq._SPAN


def test_a_limit_is_kept(tmp_path: Path) -> None:
    """What the process takes, where five times as much waits as there is room for."""
    src = native_checkpoint(
        tmp_path / "src", "qwen2", hidden_size=128, intermediate_size=1024, head_dim=64,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    script = (
        "import sys, torch\n"
        "from qquant import budget, quantize, spec_from_recipe\n"
        "from qquant.heap import trim_heap\n"
        "from qquant.host import reset_peak_memory\n"
        "torch.set_num_threads(1)\n"
        "budget.PROCESS, budget._CUDA, needs, count = 0, 0, [], budget.memory_needs\n"
        "budget.memory_needs = lambda *a: needs.append(count(*a)) or needs[-1]\n"
        "def run(ids, limit=None):\n"
        "    trim_heap(), reset_peak_memory()\n"
        "    made = quantize(*sys.argv[1:], spec_from_recipe('fast'), tokens=ids, device='cpu',"
        " compute_dtype='float32', memory=limit, overwrite=True)\n"
        "    return made.peak_bytes, made.recomputed\n"
        "ids = torch.randint(0, 256, (256, 512))\n"
        "run(ids[:16])\n"  # what is imported is
        "free = run(ids)\n"
        "trim_heap()\n"
        "least = budget.resident_bytes() + needs[-1].at_work + budget.SLACK\n"
        "limit = least + needs[-1].waiting // 5\n"
        "print(limit, *free, *run(ids, limit))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(src), str(tmp_path / "dst")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    limit, free, kept, peak, again = map(float, done.stdout.split())
    assert free > limit and kept == 0, "without a limit it takes more"
    assert peak <= limit and again > 0.5, (limit, free, peak, again)


def test_a_limit_is_kept_where_bits_are_shared_out(tmp_path: Path) -> None:
    """The least that is accepted, where measuring what bits are worth takes more than the walk."""
    src = native_checkpoint(
        tmp_path / "src", "qwen2", hidden_size=128, intermediate_size=512, head_dim=32,
        vocab_size=8192,
    )  # fmt: skip
    script = (
        "import re, sys, torch\n"
        "from dataclasses import replace\n"
        "from qquant import budget, quantize, spec_from_recipe\n"
        "from qquant.heap import trim_heap\n"
        "from qquant.errors import SpecError\n"
        "from qquant.host import reset_peak_memory\n"
        "torch.set_num_threads(1)\n"
        "budget.PROCESS = budget._HQQ = budget._CUDA = 0\n"
        "spec = replace(spec_from_recipe('fast'), target_bpw=4.5, bit_choices=(3, 8))\n"
        "def run(ids, limit=None):\n"
        "    trim_heap(), reset_peak_memory()\n"
        "    made = quantize(*sys.argv[1:], spec, tokens=ids, device='cpu',"
        " compute_dtype='float32', memory=limit, overwrite=True)\n"
        "    return made\n"
        "ids = torch.randint(0, 256, (8, 512))\n"
        "run(ids[:1, :64])\n"  # what is imported is
        "free = run(ids)\n"
        "trim_heap()\n"
        "try:\n"
        "    run(ids, 1 << 20)\n"
        "except SpecError as error:\n"
        "    least = float(re.search(r'at least ([0-9.]+) GiB', str(error))[1])\n"
        "limit = int((least + 0.006) * 2**30)\n"  # it was rounded
        "tight = run(ids, limit)\n"
        "same = tight.mixed == free.mixed\n"
        "print(limit, tight.peak_bytes, free.peak_bytes, free.foreseen.host_bytes, same)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(src), str(tmp_path / "dst")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *numbers, same = done.stdout.split()
    limit, peak, free, said = map(int, numbers)
    assert peak <= limit, (limit, peak, free, said)
    assert free <= said <= 1.35 * free, (limit, peak, free, said)
    assert same == "True"


def test_measuring_has_the_sensitivity_pass_own_numbers() -> None:
    """`budget` has copies, since `sensitivity` imports torch."""
    for name in ("_TOKENS", "_GRADIENT_TOKENS", "_HEAD_ROWS", "_TOGETHER", "_BACK"):
        own = {"_HEAD_ROWS": "_ROWS"}.get(name, name.lstrip("_") if "TOKENS" in name else name)
        assert getattr(budget, name) == getattr(sensitivity, own), name


@pytest.mark.parametrize("shape", [(12, 24), (40, 512), (3, 3000)])
def test_what_waits_while_bits_are_measured_was_foreseen(
    shape: tuple[int, int], source: Path, tmp_path: Path
) -> None:
    found = Checkpoint.open(source)
    family = family_of(found.config)
    skeleton = Skeleton(found, family, torch.device("cpu"), torch.float32)
    spec = QuantSpec(group_size=32, target_bpw=5.0, bit_choices=(3, 8))
    needs = memory_needs(Shapes.of(found, family), spec, CPU, *shape)
    assert needs.measuring is not None
    ids = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    keep = torch.bfloat16 if held_dtype("float32", skeleton.stored_dtype) else None
    for room in (2**40, 0):
        kept = Holder(host_budget=room, spill_dir=tmp_path)
        sensitivity.measure(skeleton, ids, spec, batch_tokens=1024, holder=kept, hold_dtype=keep)
        assert kept.peak_bytes <= needs.measuring.waiting <= 1.1 * kept.peak_bytes
        foreseen = needs.measuring.beyond(Room(room))
        assert kept.spilled_bytes <= foreseen <= 1.1 * kept.spilled_bytes


def test_measuring_counts_where_it_takes_more_than_the_walk(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the least limit, on host and device, and in files; not in where blocks' outputs go."""
    own = MeasuringNeeds(at_work=700 << 20, reading=90 << 20, waiting=300 << 20, batch=10 << 20)
    needs = MemoryNeeds(100 << 20, kept=0, at_work=500 << 20, reading=20 << 20, measuring=own)
    least = (1000 + 700 << 20) + budget.SLACK
    tight = holder(monkeypatch, least + (150 << 20), needs)
    assert tight.host_budget == 150 << 20 and not tight.spill_outputs
    assert needs.beyond(tight) == 170 << 20 and needs.spilled(tight) == 0
    assert needs.peaks(tight, "cpu")[0] == (700 + 150) << 20
    assert needs.peaks(Room(1 << 40, 250 << 20), "cuda") == ((90 + 50) << 20, (700 + 250) << 20)
    with pytest.raises(SpecError, match=r"--memory: expected at least 1\.72 GiB"):
        holder(monkeypatch, least - 1, needs)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    place = Place("cuda:0", "float32")
    with pytest.raises(SpecError, match="--gpu-memory"):
        find_room(needs, place, gpu_memory=(700 << 20) + budget.SLACK - 1)
    assert find_room(needs, place, gpu_memory=(900 << 20) + budget.SLACK).device_budget == 200 << 20
    # A dry run asks the same, and says no less of the disk than will be spilled.
    calib = CalibrationSpec(samples=32, seqlen=512)
    shared = QuantSpec(group_size=32, target_bpw=5.0)
    plain, more = (dry_run(source, s, calib, device="cpu") for s in (SPEC, shared))
    assert more.host_bytes > plain.host_bytes
    with pytest.raises(SpecError, match=r"--memory: expected at least"):
        dry_run(source, shared, calib, device="cpu", memory=plain.host_bytes - plain.waiting_bytes)


def holder(monkeypatch: pytest.MonkeyPatch, memory: int, needs: MemoryNeeds) -> Holder:
    monkeypatch.setattr(budget, "resident_bytes", lambda: 1000 << 20)
    return make_holder(needs, CPU, memory=memory)


def test_the_model_is_loaded_whole_within_the_limit_or_not_at_all(source: Path) -> None:
    found = Checkpoint.open(source)
    shapes = Shapes.of(found, family_of(found.config))
    wide = replace(shapes, stored="BF16")
    least = budget.process_bytes() + budget.SLACK + 2 * found.nbytes
    budget.check_sampling(found.nbytes, wide, CPU, least + (64 << 20), None)
    budget.check_sampling(found.nbytes, wide, CPU, None, None)
    with pytest.raises(SpecError, match=r"--memory: .*--calib self samples"):
        budget.check_sampling(found.nbytes, wide, CPU, least - found.nbytes, None)
    with pytest.raises(SpecError, match="--gpu-memory"):
        budget.check_sampling(found.nbytes, wide, Place("cuda", "float32"), None, found.nbytes)
    own = CalibrationSpec(sources=("self",), samples=2, seqlen=24)
    for run in (dry_run, partial(quantize, dst=source.parent / "never")):
        with pytest.raises(SpecError, match="--calib self samples"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Checkpoint, "nbytes", 1 << 40)
                run(source, quant=SPEC, calib=own, device="cpu", memory=32 << 30)
    assert not (source.parent / "never").exists()
    assert not (source.parent / ".never.qquant-work").exists()


def test_what_was_read_from_files_is_no_memory_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, whose limit counts the page cache."""
    files = {"memory.max": "4294967296", "memory.current": "4000000000"}
    files["memory.stat"] = "anon 1000\ninactive_file 3500000000\nactive_file 9\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    original = Path
    monkeypatch.setattr(host, "Path", lambda p: tmp_path if p == "/sys/fs/cgroup" else original(p))
    assert host.available_memory() == 4294967296 - 500000000
    (tmp_path / "memory.stat").unlink()  # then what there is of it is not told
    assert host.available_memory() == 4294967296 - 4000000000


def test_what_a_limit_leaves_is_for_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = MemoryNeeds(waiting=800 << 20, kept=0, at_work=500 << 20, reading=0)
    least = (1000 + 500 << 20) + budget.SLACK
    tight = holder(monkeypatch, least + (300 << 20), needs)
    assert tight.host_budget == 300 << 20 and tight.spill_outputs
    wide = holder(monkeypatch, least + (900 << 20), needs)
    assert wide.host_budget == 900 << 20 and not wide.spill_outputs
    with pytest.raises(SpecError, match=r"--memory: expected at least 1\.53 GiB"):
        holder(monkeypatch, least - 1, needs)
    with pytest.raises(SpecError, match="--gpu-memory"):
        make_holder(needs, CPU, gpu_memory=1 << 30)


def test_inputs_are_made_again_before_anything_goes_to_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = MemoryNeeds(waiting=800 << 20, kept=0, at_work=500 << 20, reading=0, inputs=400 << 20)
    least = (1000 + 500 << 20) + budget.SLACK
    for left, again, spilled in ((900, 0, 0), (600, 200, 0), (400, 400, 0), (300, 400, 100)):
        tight = holder(monkeypatch, least + (left << 20), needs)
        assert tight.recompute_from == left << 20
        assert needs.recomputed(tight) == again << 20
        assert needs.beyond(tight) == spilled << 20
        assert tight.spill_outputs == (spilled > 0)


def test_without_a_limit_a_cpu_keeps_what_loading_the_model_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "available_memory", lambda: 64 << 30)
    needs = MemoryNeeds(waiting=20 << 30, kept=0, at_work=0, reading=0, inputs=10 << 30)
    for model, kept in ((1 << 20, budget.KEPT), (15 << 30, 15 << 30), (99 << 30, 32 << 30)):
        assert find_room(needs, CPU, model=model).recompute_from == kept
    assert find_room(needs, CPU, model=15 << 30, processes=3).recompute_from == 5 << 30
    said = find_room(needs, CPU, model=1 << 20, memory=40 << 30)
    assert said.recompute_from == said.host_budget > 38 << 30, "a limit that is given is used"


@pytest.mark.parametrize("recipe", ["default", "fast", "best"])
@pytest.mark.parametrize("room", [0, 1 << 40])
def test_what_waits_is_what_was_foreseen(
    recipe: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in memory at one time, beside the slabs that are being filled."""
    src = native_checkpoint(tmp_path / "src", "qwen2", hidden_size=128, intermediate_size=512)
    spec = spec_from_recipe(recipe, group_size=32)
    tokens = torch.randint(0, 256, (64, 256), generator=torch.Generator().manual_seed(0))
    found = Checkpoint.open(src)
    needs = memory_needs(Shapes.of(found, family_of(found.config)), spec, CPU, *tokens.shape)
    waits = Holder(host_budget=2**62, recompute_from=room)
    most = [0]
    kept = Holder.hold

    def hold(self: Holder, *args: Any, **more: Any) -> Any:
        held = kept(self, *args, **more)
        most[0] = max(most[0], self.taken)
        return held

    monkeypatch.setattr(Holder, "hold", hold)
    monkeypatch.setattr("qquant.calibration.hold.SLAB", 1 << 19)
    monkeypatch.setattr("qquant.convert.make_holder", lambda *_, **__: waits)
    made = quantize(
        src, tmp_path / "dst", spec, tokens=tokens, device="cpu", compute_dtype="float32"
    )
    assert made.recomputed == (room == 0)
    foreseen = needs.waits(waits)
    assert 0.9 * foreseen <= most[0] <= foreseen + 5 * (1 << 19)


def test_what_is_made_again_is_said_and_takes_time(tmp_path: Path) -> None:
    source = native_checkpoint(tmp_path / "src", "qwen2", hidden_size=64, intermediate_size=256)
    calib = CalibrationSpec(samples=1400, seqlen=2048)  # above `KEPT` at the last stop only
    spec = replace(SPEC, correct=0.0, correct_residual=0.0)
    ask = {"device": "cpu", "compute_dtype": "float32"}
    some, all_kept = (dry_run(source, spec, calib, memory=m, **ask) for m in (None, 64 << 30))
    assert some.recomputed_bytes > 0 == all_kept.recomputed_bytes
    assert some.host_bytes < all_kept.host_bytes
    assert some.waiting_bytes == budget.KEPT
    assert some.waiting_bytes + some.recomputed_bytes == all_kept.waiting_bytes
    assert "made again" in some.render() and "made again" not in all_kept.render()
    ratios = [said.seconds["forward"] / said.seconds["hessian"] for said in (some, all_kept)]
    assert ratios[0] > ratios[1]


def test_a_limit_never_changes_the_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quantize(source, tmp_path / "plain", SPEC, tokens=TOKENS, device="cpu")
    assert plain.spilled_bytes == 0 and plain.recomputed == 0
    holders = {
        "tight": lambda *_, **__: Holder(host_budget=0, spill_outputs=True),
        "again": lambda *_, **__: Holder(host_budget=2**62, recompute_from=0),
        "both": lambda *_, **__: Holder(host_budget=0, spill_outputs=True, recompute_from=0),
    }
    for name, make_one in holders.items():
        monkeypatch.setattr("qquant.convert.make_holder", make_one)
        made = quantize(source, tmp_path / name, SPEC, tokens=TOKENS, device="cpu")
        assert (made.spilled_bytes > 0) == (name != "again")
        assert made.recomputed == (name != "tight")
        for file in sorted(plain.path.iterdir()):
            assert file.read_bytes() == (made.path / file.name).read_bytes(), file.name


PLAIN = ("--device", "cpu", "--compute-dtype", "float32")  # what numpy can stand for, anywhere


def test_the_command_needs_no_torch(source: Path, tmp_path: Path) -> None:
    """The whole answer, and the refusal of a bad source."""
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--dry-run", *PLAIN]
    lines = without_torch(*words, "--group-size", "32").splitlines()
    labels = [line[:17].strip() for line in lines if not line.startswith("note: ")]
    told = ["to quantize", "bits per weight", "output", "calibration"]
    assert labels == [*told, "host memory", "disk", "spill", "time"]
    assert "measured with numpy" in lines[len(labels) - 1]
    script = (
        "import sys\nfrom qquant.cli import cli\n"
        f"cli({[*words, '--group-size', '32']!r}, standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.alone
def test_the_command_takes_less_than_importing_torch(source: Path, tmp_path: Path) -> None:
    """Beside what it measures for; about a second in all, on a machine where torch takes 1.5 s."""
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--dry-run", *PLAIN]
    dry = [sys.executable, "-m", "qquant", *words, "--group-size", "32"]

    def seconds(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start

    both = [(seconds(dry), seconds([sys.executable, "-c", "import torch"])) for _ in range(3)]
    fastest, torchs = map(min, zip(*both, strict=True))
    assert fastest - pace.QUICK < torchs, both


def test_where_it_runs_is_what_torch_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    device = choose_device("auto")
    assert find_place("auto", "auto") == Place.of(device, *choose_compute("auto", device))
    for dtype in ("float32", "bfloat16", "float16"):
        assert find_place("cpu", dtype) == Place("cpu", dtype)
    with pytest.raises(SpecError, match="compute dtype"):
        find_place("cpu", "int8")
    monkeypatch.setattr(place, "cpu_multiplies_bfloat16", lambda: True)
    assert find_place("cpu", "auto") == Place("cpu", "bfloat16")
    # Where there may be an accelerator, torch is asked.
    monkeypatch.setattr(place, "no_accelerator", lambda: False)
    monkeypatch.setattr("qquant.devices.choose_device", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr("qquant.devices.choose_dtype", lambda *_: torch.float16)
    found = find_place("auto", "auto")
    assert found == Place("cuda:1", "float16") and found.kind == "cuda" and not found.plain


@pytest.mark.parametrize(
    ("line", "fast"),
    [
        ("flags\t\t: fpu avx512_bf16", True),
        ("Features : asimd bf16", True),
        ("flags : avx2", False),
    ],
)
def test_what_the_system_says_of_a_processor(tmp_path: Path, line: str, fast: bool) -> None:
    said = tmp_path / "cpuinfo"
    assert cpu_multiplies_bfloat16(said) is None
    said.write_text(f"processor : 0\n{line}\n")
    assert cpu_multiplies_bfloat16(said) is fast


def test_another_dtype_is_measured_with_torch(source: Path) -> None:
    said = dry_run(source, SPEC, CALIB, device="cpu", compute_dtype="bfloat16")
    assert set(said.seconds) == {"set-up", "forward", "hessian", "solve", "write and verify"}
    assert all(value > 0 for value in said.seconds.values())
    assert said.measured_with == "torch" and "measured with torch" in said.render()


def test_headers_are_told_before_torch_is_asked(source: Path, tmp_path: Path) -> None:
    words = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--dry-run", "--device", "cpu"]
    words += ["--group-size", "32", "--compute-dtype", "bfloat16"]
    script = f"import sys; sys.modules['torch'] = None; from qquant.cli import cli; cli({words!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = foresee(source, SPEC, CalibrationSpec(), OutputSpec())
    assert done.stdout.splitlines() == told.render().splitlines()
    assert "torch" in done.stderr and done.returncode != 0
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(told.render()) and result.stdout.count("bits per weight") == 1


def test_the_command(source: Path, tmp_path: Path) -> None:
    bare = ["quantize", str(source), "-o", str(tmp_path / "dst"), "--device", "cpu", "--dry-run"]
    words = [*bare, "--group-size", "32"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    for word in ("bits per weight", "host memory", "disk", "calibration", "time"):
        assert word in result.stdout
    result = CliRunner().invoke(cli, [*words, "--log-json"])
    found = json.loads(result.stdout)
    assert found["event"] == "estimate" and found["total_seconds"] > 0
    assert not (tmp_path / "dst").exists()
    for more, text in (
        (["--memory", "1MB"], "--memory: expected at least"),
        (["--memory", "much"], "--memory: expected a size"),
    ):
        result = CliRunner().invoke(cli, [*words, *more])
        assert result.exit_code == 2 and text in result.stderr, result.output
    result = CliRunner().invoke(cli, [*bare, "--method", "nf4"])
    assert result.exit_code == 2 and "--dry-run: expected no such" in result.stderr


def test_the_room_for_what_is_kept_counts(source: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    said = dry_run(source, SPEC, CalibrationSpec(samples=10**6, seqlen=24), device="cpu")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 200 << 20))
    assert said.disk_bytes > 200 << 20
    with pytest.raises(TargetError, match="disk of"):
        quantize(source, tmp_path / "d", SPEC, CalibrationSpec(samples=10**6, seqlen=24))


@pytest.mark.parametrize(("name", "said"), [("gone.json", "does not exist"), ("", "a directory")])
def test_a_calibration_source_that_is_not_there(
    name: str, said: str, source: Path, tmp_path: Path
) -> None:
    calib = CalibrationSpec(sources=(str(tmp_path / name),), samples=2, seqlen=24)
    for run in (dry_run, lambda *a, **k: quantize(a[0], tmp_path / "d", *a[1:], **k)):
        with pytest.raises(CalibrationError, match=said):
            run(source, SPEC, calib, device="cpu")
    assert dry_run(source, replace(SPEC, method="rtn"), calib, device="cpu").linears


def test_a_model_that_samples_its_own_text_says_so(source: Path) -> None:
    own = CalibrationSpec(sources=("self",), samples=2, seqlen=24)
    said = dry_run(source, SPEC, own, device="cpu").notes
    assert any("loads it whole" in note for note in said)
    assert not any("loads it whole" in n for n in dry_run(source, SPEC, device="cpu").notes)


def test_the_room_for_what_is_spilled_counts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with room for everything but the activations that do not fit in memory."""
    needs = MemoryNeeds(waiting=100 << 20, kept=0, at_work=0, reading=0)
    assert needs.beyond(Room(30 << 20)) == 70 << 20
    assert needs.beyond(Room(30 << 20, device_budget=80 << 20)) == 0
    # Outputs of blocks wait on the host unless the device has room for everything.
    outputs = replace(needs, outputs=40 << 20)
    assert outputs.beyond(Room(30 << 20, device_budget=80 << 20)) == 40 << 20
    assert outputs.beyond(Room(40 << 20, device_budget=80 << 20)) == 0
    assert outputs.beyond(Room(30 << 20, device_budget=100 << 20, device_outputs=True)) == 0
    assert outputs.beyond(Room(100 << 20)) == 0
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 200 << 20))
    monkeypatch.setattr(MemoryNeeds, "beyond", lambda *_: 300 << 20)
    with pytest.raises(TargetError, match="disk of"):
        quantize(source, tmp_path / "d", SPEC, CalibrationSpec(samples=2, seqlen=24))


@pytest.mark.parametrize("quantized", [None, 0.5])
@pytest.mark.parametrize("streams", [1, 2])
def test_each_stream_takes_its_own_time(streams: int, quantized: float | None) -> None:
    """What is made again, gate and up, is of the quantized one."""
    costs = Costs("", 0.0, 1.0, lambda _: (0.0, 0.0), lambda n, k: 0.0, quantized=quantized)
    group: Any = namedtuple("group", "times share rows inputs")(1, 1.0, 8, 16)
    shapes: Any = namedtuple("shapes", "groups blocks hidden widest")([group], 1, 4, 8)
    found: Any = namedtuple("found", "output_bytes")(0)
    quant = QuantSpec() if streams == 2 else spec_from_recipe("fast")
    assert quant.streams == streams
    calib = CalibrationSpec(samples=10, seqlen=5)
    seconds = estimate_module._seconds(costs, shapes, quant, calib, found, 1, 0.3)
    own = 1.0 if quantized is None else quantized
    share = quant.correct_share if streams == 2 else 0
    assert seconds["forward"] == pytest.approx(50 * ((1 + 0.3 * 0.5) * own + share * 1.0))
