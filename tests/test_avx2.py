"""The kernel in machine code for AVX2: right to its inputs' rounding, or refused in words."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys

import handmade
import pytest
import torch
from test_runtime import linear, needs_avx2

from qquant import avx2, avx2_ir, kernel_choice, kernels, llvm_code
from qquant.avx2 import Avx2
from qquant.errors import RunError, SpecError
from qquant.kernel_choice import measure_few_tokens, on_cpu
from qquant.kernels import ANY_ROWS, misfit
from qquant.pack import pack_codes, unpack_codes
from qquant.runtime import load


def rounding(x, weight, groups):
    """How much results may be off: half a step of each input, and float32's sums.

    Args:
        groups: int64 [K], of each input.
    """
    own = [x[:, groups == group].double().abs().amax(1) for group in range(int(groups.max()) + 1)]
    half = torch.stack(own, dim=1)[:, groups] / (2 * avx2_ir.TOP)
    return half @ weight.abs().T + 1e-6 * (x.double().abs() @ weight.abs().T) + 1e-9


@needs_avx2
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("more", [{}, {"v2": True}, {"desc_act": True}])
@pytest.mark.parametrize(
    ("out", "inp", "group_size", "rows"),
    [
        (32, 32, 32, 1),  # half a block
        (96, 128, 64, 4),  # blocks of 32
        (64, 256, 128, 33),  # a whole block, tiles of rows and one over
        (160, 128, 16, 3),
        (32, 96, 96, 131),  # more rows than at a time
        (32, 1056, -1, 2),  # one group, longer than integers allow: as six of 176
    ],
)
def test_results_are_off_by_the_rounding_of_inputs_alone(
    bits, sym, more, out, inp, group_size, rows
):
    module, weight, bias = linear(
        out, inp, bits=bits, sym=sym, group_size=group_size, bias=True, seed=rows, **more
    )
    module.use("avx2")
    x = torch.randn(rows, inp) * torch.rand(inp).exp()
    module.few_tokens = rows
    got, want = module(x).double(), x.double() @ weight.T + bias.double()
    groups = module.g_idx.long()
    if group_size == -1:
        groups = torch.arange(inp) // 176
    assert ((got - want).abs() <= rounding(x, weight, groups) + 1e-6 * want.abs()).all()
    assert (got - want).norm() < 1e-4 * want.norm()


@needs_avx2
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("code", [0, -1])
@pytest.mark.parametrize("zero", [0, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_are_multiplied_exactly(bits, code, zero, sign):
    """The longest group, each input the largest integer: sums reach what 32 bits hold."""
    most, inputs = 2**bits - 1, avx2._LONGEST
    codes = torch.full((8, inputs), most & code, dtype=torch.uint8)
    zeros = torch.full((8, 1), most & zero, dtype=torch.uint8)
    held = Avx2.pack(pack_codes(codes, bits), torch.ones(1, 8), zeros, bits, inputs)
    got = held.product(torch.full((5, inputs), float(sign)))
    assert torch.equal(
        got, torch.full((5, 8), float(sign * inputs * ((most & code) - int(zeros[0]))))
    )


@needs_avx2
def test_whole_numbers_come_out_as_they_are():
    """Whose largest is the largest integer: no rounding at all, in pairs of all signs."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 64), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (64, 2), generator=draw, dtype=torch.uint8)
    x = torch.randint(-40, 41, (6, 64), generator=draw).float()
    x[:, ::32] = avx2_ir.TOP  # the first of each group
    weight = codes.double() - zeros.double().repeat_interleave(32, dim=1)
    held = Avx2.pack(pack_codes(codes, 4), torch.ones(2, 64).half(), zeros, 4, 32)
    assert torch.equal(held.product(x).double(), x.double() @ weight.T)


@needs_avx2
def test_what_is_not_finite_spoils_its_own_row_alone():
    module, weight, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    x = torch.randn(6, 128)
    x[1, 3], x[3, 77], x[4, 127] = float("nan"), float("inf"), -float("inf")
    got = module(x)
    assert got[[1, 3, 4]].isnan().all()
    fine = [0, 2, 5]
    assert torch.allclose(got[fine].double(), x[fine].double() @ weight.T, atol=1e-3)


@needs_avx2
def test_magnitudes_from_nothing_to_the_largest():
    module, weight, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    assert not module(torch.zeros(2, 128)).any()
    assert not module(torch.full((2, 128), 1e-39)).any()  # too small for a step
    x = torch.randn(2, 128)
    for size in (1e-25, 1e25):
        want = (size * x).double() @ weight.T
        assert (module(size * x).double() - want).norm() < 1e-4 * want.norm()


@needs_avx2
@pytest.mark.parametrize("rows", [1, 7])
def test_as_many_threads_as_torch_has_change_nothing(rows, monkeypatch):
    module, _, _ = linear(320, 128, group_size=32)  # five blocks
    module.use("avx2")
    x = torch.randn(rows, 128)
    want, asked = module(x), []
    own = llvm_code.threads()

    def watched(function, given, count, flags):
        asked.append(count)
        own.run(function, given, count, flags)

    monkeypatch.setattr(llvm_code, "threads", lambda: own._replace(run=watched))
    for count in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert torch.equal(module(x), want)
    assert asked == [1, 2, 3, 8]


@needs_avx2
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inputs_of_any_dtype_and_stride(dtype):
    module, _, _ = linear(64, 128, group_size=32, bias=True)
    module.use("avx2")
    wide = torch.randn(3, 256).to(dtype)
    got = module(wide[:, ::2].unsqueeze(0))
    assert got.dtype == dtype and got.shape == (1, 3, 64)
    assert torch.equal(got[0], module(wide[:, ::2].contiguous()))


@needs_avx2
def test_scales_wider_than_half():
    """As of other tools' files: kept in float32."""
    module, weight, _ = linear(64, 128, group_size=32)
    module.scales = module.scales.float() * (1 + 2**-15)
    module.use("avx2")
    x = torch.randn(3, 128)
    want = (x.double() @ weight.T) * (1 + 2**-15)
    assert (module(x).double() - want).norm() < 1e-4 * want.norm()
    assert module._held.scales.dtype == torch.float32
    module.scales = module.scales.bfloat16()
    module.use("avx2")
    assert module._held.scales.dtype == torch.float32


@needs_avx2
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("out", [32, 160])
def test_the_files_packing_is_dropped_and_comes_back(bits, desc_act, out):
    module, weight, _ = linear(out, 256, bits=bits, group_size=64, desc_act=desc_act)
    stored = {k: v.clone() for k, v in module.state_dict().items()}
    before = module.nbytes
    module.use("avx2")
    assert module.qweight is None and module.packings == 1
    held = out * 256 * avx2.held_bits(bits) // 8 + (2 + 1) * out * 4 + 8 * 256 * desc_act
    assert module.nbytes - before == held - out * 256 * bits // 8
    assert module.read_bytes(1) == held  # without a bias, all that a product reads
    assert torch.equal(module.codes(), unpack_codes(stored["qweight"], bits))
    again = module.state_dict()
    assert all(torch.equal(again[k], stored[k]) for k in stored) and again.keys() == stored.keys()
    x = torch.randn(40, 256)
    module.few_tokens = 8
    slack = 1e-6 * (x.double().abs() @ weight.abs().T).max()
    assert (module(x).double() - x.double() @ weight.T).abs().max() <= slack  # by tiles
    assert torch.equal(copy.deepcopy(module)(x[:3]), module(x[:3]))
    module.use("dequantize")
    assert torch.equal(module.qweight, stored["qweight"]) and module.nbytes == before


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"out": 32, "inp": 96, "group_size": 64}, "groups differ in size"),
        ({"out": 32, "inp": 64, "group_size": 4}, "group size 4, the kernel takes multiples of 8"),
        ({"out": 32, "inp": 64, "group_size": 8, "bits": 2}, "takes multiples of 16"),
        ({"out": 32, "inp": 1184, "group_size": 296}, "falls into parts of 8"),
    ],
)
def test_it_says_why_it_does_not_fit(kwargs, reason):
    module, _, _ = linear(**kwargs)
    assert reason in misfit(module, "avx2")
    with pytest.raises(SpecError, match=reason):
        module.use("avx2")
    assert "12 outputs" in avx2.unfit(4, 32, 12)
    assert "device cuda" in avx2.misfit(4, 32, 64, torch.device("cuda"))


def test_where_it_cannot_run_that_is_said(monkeypatch):
    """Each in words, and none of them as an error."""

    def fail():
        raise OSError("torch has no libtorch_cpu\nmore")

    known = avx2.unavailable.__wrapped__
    monkeypatch.setattr(llvm_code, "unavailable", llvm_code.unavailable.__wrapped__)
    monkeypatch.setattr(llvm_code, "has", lambda *features: True)
    monkeypatch.setattr(llvm_code.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(avx2, "_trial", lambda: 1e-5)
    assert known() is None
    monkeypatch.setattr(llvm_code, "_may_run_code", lambda: False)
    assert known() == "the system lets no process run code that it has written"
    monkeypatch.setattr(llvm_code, "_may_run_code", lambda: True)
    for off in (0.01, float("nan")):
        monkeypatch.setattr(avx2, "_trial", lambda off=off: off)
        assert known() == f"its products are off by {off:.2g}"
    monkeypatch.setattr(avx2, "_trial", fail)
    assert known() == "OSError: torch has no libtorch_cpu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert known() == "llvmlite is not installed (pip install llvmlite)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(llvm_code, "threads", fail)
    assert known() == "OSError: torch has no libtorch_cpu"
    monkeypatch.setattr(llvm_code, "has", lambda *features: set(features) <= {"fma"})
    assert known() == "a processor without avx2 and f16c"
    monkeypatch.setattr(llvm_code.platform, "machine", lambda: "aarch64")
    assert "aarch64" in known()


FIRST_USE = """
import sys, torch
from qquant import avx2
given = sys.argv[1]
if given == "meta":
    torch.set_default_device("meta")
elif given != "nothing":
    torch.set_default_dtype(getattr(torch, given))
assert avx2.unavailable() is None, avx2.unavailable()
how = {"device": "cpu"}
codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8, **how)
packed = avx2.pack_codes(codes, 4)
zeros, scales = torch.full((64, 2), 8, dtype=torch.uint8, **how), torch.ones(2, 64, **how).half()
from qquant.kernels import QuantLinear
from qquant.pack import Packed, zero_words
words = zero_words(zeros - 1, 4)
made = QuantLinear(Packed(packed, words, scales, torch.arange(64, **how) // 32), bits=4)
made.use("avx2")
x = torch.randn(7, 64, dtype=torch.float32, **how)
want = x.double() @ (codes.double() - 8).T
for most, off in ((7, 1e-3), (0, 1e-5)):  # by the kernel, by tiles
    made.few_tokens = most
    assert (made(x).double() - want).norm() < off * want.norm()
print("right")
"""


@needs_avx2
@pytest.mark.parametrize("given", ["nothing", "float64", "bfloat16", "float16", "meta"])
def test_the_first_use_in_a_process_whatever_torchs_defaults_are(given):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", FIRST_USE, given],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "right", done.stderr[-2000:]


@needs_avx2
def test_where_no_code_may_be_made_it_says_so_and_lives():
    """Under `PR_SET_MDWE`, as of services that systemd tells so; LLVM itself would crash."""
    script = (
        "import ctypes\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):\n"
        "    raise SystemExit('cannot be asked for')\n"
        "from qquant import avx2\n"
        "print(avx2.unavailable())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if "cannot be asked for" in done.stderr:
        pytest.skip("this kernel does not know PR_SET_MDWE")
    assert done.stdout.strip() == "the system lets no process run code that it has written"


@needs_avx2
def test_tensors_that_are_not_on_the_cpu():
    """Shapes of what holds nothing; no address of anything else is taken."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, _, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    x = torch.randn(3, 128)
    want = module(x)
    out = module(torch.empty(4, 128, device="meta"))
    assert out.device.type == "meta" and out.shape == (4, 64)
    with torch.device("meta"):
        assert torch.equal(module(x), want)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.empty(4, 128)).shape == (4, 64)
    assert torch.equal(module(torch._neg_view(x)), module(-x))


@needs_avx2
def test_tensors_of_several_linears_are_refused():
    module, _, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    held = module._held
    with pytest.raises(RunError, match=r"kernel avx2.*of one linear"):
        held.product(torch.randn(1, 256))
    for name in ("scales", "zeros", "words"):
        other = copy.copy(held)
        setattr(other, name, getattr(held, name)[:, :3])
        with pytest.raises(RunError, match="kernel avx2"):
            other.product(torch.randn(1, 128))


@needs_avx2
def test_a_pickled_linear_where_the_kernel_does_not_run(monkeypatch, caplog):
    module, _, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    x = torch.randn(3, 128)
    want, held = module(x), pickle.dumps(module)
    assert torch.equal(pickle.loads(held)(x), want)
    monkeypatch.setattr(avx2, "unavailable", lambda: "no llvmlite")
    again = pickle.loads(held)
    assert again.kernel == "dequantize" and "no llvmlite" in caplog.text
    assert (again(x) - want).norm() < 1e-4 * want.norm()


@needs_avx2
def test_it_takes_any_number_of_rows_where_nobody_says_otherwise():
    module, _, _ = linear(64, 128, group_size=32)
    module.use("avx2")
    assert module.few_tokens == ANY_ROWS
    module.few_tokens = 5
    module.load_state_dict(module.state_dict())
    assert module.few_tokens == 5
    module.use("torch-int4")
    assert module.few_tokens == kernels.FEW_TOKENS


def test_both_kernels_are_accounted_for(monkeypatch):
    """Where `dequantize` is left, it is said what speaks against each."""
    monkeypatch.setattr(avx2, "unavailable", lambda: "llvmlite is not installed")
    module, _, _ = linear(64, 128, group_size=16)
    kernel, why = on_cpu(module, exact=False)
    assert kernel == "dequantize"
    assert why == (
        "group size 16, the op takes multiples of 32; not avx2: llvmlite is not installed"
    )
    uneven, _, _ = linear(32, 96, group_size=64)
    assert on_cpu(uneven, exact=False)[1] == "groups differ in size (a short last one)"


@needs_avx2
def test_it_runs_here():
    """A kernel that broke would have its other tests fail; a refusal would only be read."""
    assert avx2.unavailable() is None


@needs_avx2
def test_the_trial_sees_a_wrong_product(monkeypatch):
    assert avx2._trial() < avx2._NEAR / 10
    right = Avx2.product
    monkeypatch.setattr(Avx2, "product", lambda self, x: right(self, x.roll(1, dims=1)))
    assert avx2._trial() > avx2._NEAR


@needs_avx2
@pytest.mark.parametrize(
    ("slower_from", "few"), [(512, ANY_ROWS), (256, 128), (64, 32), (4, 2), (1, 1)]
)
def test_rows_are_as_many_as_it_is_quicker_for(slower_from, few, monkeypatch):
    module, _, _ = linear(1024, 1024, group_size=128)
    module.use("avx2")
    kernel = module._by_held

    def timed(call, times, *, device):
        return 2.0 if call.func == kernel and call.args[0].shape[0] >= slower_from else 1.0

    monkeypatch.setattr(kernel_choice, "fastest_of", timed)
    assert measure_few_tokens(module, torch.float32) == few


@needs_avx2
def test_a_model_runs_under_it_by_name(tmp_path):
    model = handmade.tiny_qwen2(layers=1)
    path, dense = handmade.make_pair(model, tmp_path, blocks="model.layers", group_size=16)
    loaded = load(path, device="cpu", kernel="avx2", dtype="float32")
    assert loaded.kernel.counts == {"avx2": 7}
    assert "avx2 for 7 linears; avx2 inputs in 16 bits; float32" in str(loaded.kernel)
    ids = torch.arange(1, 49)[None]
    want = load(dense, device="cpu").model(ids).logits
    off = (loaded.model(ids).logits - want).norm() / want.norm()
    assert 0 < off < 1e-3
    few = load(path, device="cpu", kernel="avx2", dtype="float32", few_tokens=8)
    assert "avx2 inputs in 16 bits and up to 8 rows, beyond dequantize" in str(few.kernel)
    assert (few.model(ids).logits - want).norm() < 1e-5 * want.norm()  # by tiles
    assert kernels.HELD == ("torch-int4", "avx2")
