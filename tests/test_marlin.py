"""Kernel `marlin`: what gptqmodel's class is given, and that whoever it does not fit is told why.

Without a GPU Marlin itself cannot run. A stand-in has the signature of gptqmodel 7.6.0's
`MarlinLinear`, and multiplies by what it was filled with, read as a symmetric GPTQ file; a test
holds the signature against gptqmodel's own where that is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qquant import kernels, marlin
from qquant.errors import SpecError
from qquant.kernel_choice import fastest
from qquant.kernels import QuantLinear
from qquant.pack import V1, Packed, dequantize, pack

K, N = 64, 32
MADE: list[dict[str, Any]] = []


class StandIn(nn.Module):
    """Filled and used as `MarlinLinear` is."""

    def __init__(
        self,
        bits: int,
        group_size: int,
        desc_act: bool,
        sym: bool,
        in_features: int,
        out_features: int,
        bias: bool = False,
        pack_dtype: torch.dtype = torch.int32,
        register_buffers: bool = False,
        adapter: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        MADE.append({**locals(), **kwargs})
        self.bits, dtype = bits, kwargs["dtype"]
        groups = in_features // (in_features if group_size == -1 else group_size)
        for name, shape, kind in (
            ("qweight", (in_features * bits // 32, out_features), torch.int32),
            ("qzeros", (groups, out_features * bits // 32), torch.int32),
            ("scales", (groups, out_features), dtype),
            ("g_idx", (in_features,), torch.int32),
        ):
            empty = torch.zeros(shape, dtype=kind)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.weight: Tensor | None = None

    def post_init(self) -> None:
        # As the real one drops the zero points and takes the middle for all of them.
        middle = torch.full_like(self.qzeros, {4: 0x77777777, 8: 0x7F7F7F7F}[self.bits])
        packed = Packed(self.qweight.data, middle, self.scales.data.half(), self.g_idx.data)
        weight = dequantize(packed, self.bits, zero_offset=V1, dtype=torch.float32)
        self.weight = weight.to(self.scales.dtype)
        self.qweight.data.zero_()  # it may do with its own tensors what it likes

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and x.dtype == self.scales.dtype
        return x @ self.weight.T


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """In place of gptqmodel, on a device that passes for CUDA in `misfit` alone."""
    module: Any = types.ModuleType(marlin._MODULE)
    module.MarlinLinear = StandIn
    monkeypatch.setitem(sys.modules, marlin._MODULE, module)
    MADE.clear()
    return StandIn


def linear(
    bits: int = 4, group: int = 32, *, zero: int | None = None, seed: int = 0
) -> QuantLinear:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8)
    scales = torch.rand(N, K // group, generator=g) - 0.5  # of both signs
    zeros = torch.full((N, K // group), 2 ** (bits - 1) if zero is None else zero)
    packed = pack(codes, scales, zeros.to(torch.uint8), bits=bits, group_size=group)
    return QuantLinear(packed, torch.randn(N, generator=g), bits=bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_given_the_files_tensors(
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> None:
    ours = linear(bits, group)
    before = ours.state_dict()["qweight"].clone()
    x = torch.randn(2, 50, K).to(dtype)
    want = x.float() @ ours.dense(torch.float32).weight.T + ours.bias
    monkeypatch.setattr(marlin, "misfit", lambda _linear: None)
    ours.use("marlin", dtype)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    assert MADE[0]["dtype"] == half and MADE[0]["group_size"] == (-1 if group == K else group)
    assert (MADE[0]["sym"], MADE[0]["desc_act"], MADE[0]["bias"]) == (True, False, False)
    got = ours(x)
    assert got.dtype == dtype and got.shape == (2, 50, N)
    assert (got.float() - want).norm() < 0.01 * want.norm()
    assert len(MADE) == 1, "made once"
    assert ours(x[:, :0]).shape == (2, 0, N)

    # The state dict is the file's, whatever Marlin does with its own tensors.
    assert torch.equal(ours.state_dict()["qweight"], before)
    assert set(ours.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert ours.packings == 2 and ours.nbytes > linear(bits, group).nbytes + before.nbytes
    ours.use("dequantize")
    assert ours.packings == 1 and ours.nbytes == linear(bits, group).nbytes


def test_another_dtype_is_packed_for(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = linear()
    monkeypatch.setattr(marlin, "misfit", lambda _linear: None)
    ours.use("marlin", torch.float16)
    assert ours(torch.ones(1, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [made["dtype"] for made in MADE] == [torch.float16, torch.bfloat16]


def test_gradients_go_another_way(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = linear()
    monkeypatch.setattr(marlin, "misfit", lambda _linear: None)
    ours.use("marlin", torch.float32)
    x = torch.randn(3, K, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, ours.dense(torch.float32).weight.sum(0).expand(3, -1))


def test_whom_it_does_not_fit() -> None:
    """Told on any machine; what depends on the machine comes after what depends on the file."""
    assert "3 bits" in str(marlin.misfit(_three_bits()))
    assert "zero points" in str(marlin.misfit(linear(zero=7)))
    assert "group size 16" in str(marlin.misfit(linear(group=16)))
    assert "device cpu" in str(marlin.misfit(linear()))
    assert "device cpu" in str(marlin.misfit(linear(group=K)))
    shuffled = linear()
    packed = Packed(shuffled.qweight, shuffled.qzeros, shuffled.scales, shuffled.g_idx.flip(0))
    assert "g_idx" in str(marlin.misfit(QuantLinear(packed, bits=4)))
    with pytest.raises(SpecError, match="device cpu"):
        linear().use("marlin")


def _three_bits() -> QuantLinear:
    codes = torch.zeros(N, K, dtype=torch.uint8)
    zeros = torch.full((N, 2), 4, dtype=torch.uint8)
    return QuantLinear(pack(codes, torch.ones(N, 2), zeros, bits=3, group_size=32), bits=3)


def test_auto_leaves_it_where_it_is_wrong_or_raises(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marlin, "misfit", lambda _linear: None)
    monkeypatch.setattr(kernels, "int4_misfit", lambda *_: "left out here")
    monkeypatch.setattr(kernels.avx2, "misfit", lambda *_: "left out here")
    assert re.search(r"marlin: \d+ us", fastest(linear(), torch.float32)[1])
    assert "marlin: not tried" in fastest(linear(), torch.float32, ["marlin"])[1]
    right = StandIn.forward

    def wrong(self: StandIn, x: Tensor) -> Tensor:
        return 1.1 * right(self, x)

    monkeypatch.setattr(StandIn, "forward", wrong)
    ours = linear()
    name, said = fastest(ours, torch.float32)
    assert name == ours.kernel == "dequantize" and "marlin: wrong" in said

    def broken(self: StandIn) -> None:
        raise RuntimeError("nvcc is not there")

    monkeypatch.setattr(StandIn, "post_init", broken)
    name, said = fastest(ours, torch.float32)
    assert name == ours.kernel == "dequantize" and "nvcc is not there" in said
    with pytest.raises(SpecError, match="nvcc is not there"):
        ours.use("marlin")
    assert ours.kernel == "dequantize" and ours.packings == 1


def test_an_import_leaves_environment_and_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "import os\nprint('a banner')\nos.environ['CUDA_DEVICE_ORDER'] = 'PCI_BUS_ID'\n"
    (tmp_path / "loud_module_of_this_test.py").write_text(text + "os.environ.pop('KEPT')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(marlin, "_MODULE", "loud_module_of_this_test")
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert marlin._imported().__name__ == "loud_module_of_this_test"
    assert os.environ["KEPT"] == "1" and "CUDA_DEVICE_ORDER" not in os.environ
    shown = capsys.readouterr()
    assert "a banner" in shown.err and not shown.out


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not there")
def test_the_stand_in_has_gptqmodels_signature() -> None:
    """Read, not imported: the import changes other packages."""
    spec = importlib.util.find_spec("gptqmodel")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "nn_modules", "qlinear", "marlin.py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    real = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == "MarlinLinear").body
    functions = {n.name: n for n in real if isinstance(n, ast.FunctionDef)}
    names = [arg.arg for arg in functions["__init__"].args.args]
    assert [*names, "kwargs"] == list(inspect.signature(StandIn.__init__).parameters)
    assert {"post_init", "forward"} <= set(functions)
    said = {
        ast.unparse(n.targets[0]): ast.literal_eval(n.value)
        for n in real
        if isinstance(n, ast.Assign)
        and isinstance(n.value, ast.List)
        and all(isinstance(x, ast.Constant | ast.UnaryOp) for x in n.value.elts)
    }
    assert said["SUPPORTS_BITS"] == list(marlin.BITS)
    assert set(marlin.GROUPS) <= set(said["SUPPORTS_GROUP_SIZE"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not there")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n", "group"), [(256, 512, 128), (512, 256, 32), (128, 192, 128)])
def test_on_a_gpu_it_is_right(bits: int, k: int, n: int, group: int) -> None:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    zeros = torch.full((n, k // group), 2 ** (bits - 1), dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=g) - 0.5
    ours = QuantLinear(pack(codes, scales, zeros, bits=bits, group_size=group), bits=bits).cuda()
    x = torch.randn(33, k, device="cuda", dtype=torch.float16)
    want = x.float() @ ours.dense(torch.float32).weight.T
    ours.use("marlin", x.dtype)
    for rows in (1, 16, 33):
        got = ours(x[:rows]).float()
        assert (got - want[:rows]).norm() < 0.01 * want[:rows].norm()
