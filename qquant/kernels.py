"""The quantized linear at run time: GPTQ's stored tensors and the named kernels that use them.

A `QuantLinear` keeps the tensors of the file as they are (`qweight`, `qzeros`, `scales`, `g_idx`:
its state dict is the file's) and runs under one of the kernels below. Which one is an argument, and
one that does not fit says why.

- `dequantize` multiplies by float32 weights rebuilt from the codes in tiles of output columns, at
  every call (`rebuild.py`). It takes any bits, group size, zero points and `g_idx`, and is exact: a
  tile's weights are rounded once, to the input's dtype. It costs time: a whole unpacking per call.
- `torch-int4` is torch's own int4 product (`int4_torch.py`): on a CPU for 2, 3, 4 and 8 bits, on
  CUDA for 4 with trivial `g_idx`, in groups that are multiples of 32. Its inputs and scales are
  rounded to bfloat16 (measured on AVX2, 2048 x 2048, one token: 0.29 ms, `dequantize` 4 ms, an
  unquantized float32 product 0.58). Its time grows with the tokens, so above `few_tokens` rows the
  same linear goes through `dequantize`. On a CPU that reads torch's own packing back, which takes
  the place of the file's `qweight`: half a byte per weight, a byte for 8 bits. On CUDA both are
  kept, a byte.
- `avx2` is ours (`avx2.py`), for x86-64 CPUs with AVX2, where llvmlite is installed: 2, 3, 4 and 8
  bits, any `g_idx` of groups of one size. Inputs are rounded to 16 bits, group by group (as above:
  0.14 ms). It takes the place of the file's `qweight`, too, and as many rows as a measurement finds
  it quicker for, up to any number.
- `triton-int4` is ours (`int4_triton.py`), for 2, 4 and 8 bits on CUDA, any group and `g_idx`. It
  reads the file's tensors as they are, so the codes are held once. Up to 16 rows; more go through
  `dequantize`, and all of them where the module is moved off CUDA. Not yet run on a GPU.
- `marlin` is gptqmodel's, where that is installed (`marlin.py`): 4 and 8 bits with a symmetric grid
  on CUDA, for any number of rows. Both packings are held. Not yet run on a GPU.
- `dense` is not a kernel of this class but its absence: the weights are rebuilt once and held as
  an ordinary `nn.Linear`, with the memory that costs. For measuring accuracy, where time matters.

Left out on purpose: which kernel is taken (`kernel_choice.py`); gradients through `torch-int4` and
`avx2` (an input that needs them goes through `dequantize`).
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import avx2, marlin
from .avx2 import Avx2
from .errors import RunError, SpecError, said_of
from .int4_cpu import Int4Order
from .int4_torch import Int4, int4_misfit
from .pack import V1, Packed, dequantize, pack_codes, unpack_codes, unpack_zeros
from .rebuild import Form, choose, weights

logger = logging.getLogger(__name__)

KERNELS = ("torch-int4", "dequantize", "dense", "avx2", "triton-int4", "marlin")
PRODUCTS = tuple(name for name in KERNELS if name != "dense")  # of a `QuantLinear`
HELD = ("torch-int4", "avx2")  # have a packing of their own, which can stand for the file's
FEW_TOKENS = 32  # rows at the most, and where nobody measures; on CUDA not yet measured
ANY_ROWS = sys.maxsize  # `avx2`'s, where nobody measures
TRITON_ROWS = 16  # up to which `triton-int4` runs, where nobody says otherwise; not measured
_SPAN = 256  # rows read back at a time
_TILE = {"cpu": 1 << 19, "cuda": 1 << 25}  # weights rebuilt at a time: an L2 cache, 128 MB


class QuantLinear(nn.Module):
    """`x @ W.T + bias` with `W` [N, K] as GPTQ stores it.

    Args:
        packed: qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales float16 [G, N],
            g_idx int32 [K], all on one device.
        bias: floating [N], or None.
        bits: 2, 3, 4 or 8.
        zero_offset: what the file's zeros are short of: 1 for v1, 0 for v2.

    Raises:
        SpecError, CheckpointError: from `pack`, for tensors that are no packed linear.
    """

    qweight: Tensor | None
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, *, bits: int, zero_offset: int = V1
    ) -> None:
        super().__init__()
        self.bits, self.zero_offset = bits, zero_offset
        self.out_features = packed.qweight.shape[1]
        self.in_features = packed.g_idx.numel()
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.register_buffer("zeros", None, persistent=False)
        self._derive()
        self.kernel = "dequantize"
        self.few_tokens = FEW_TOKENS
        self._held: Int4 | Avx2 | None = None  # stands for `qweight` where that is None
        # For which device and dtype, and what multiplies: in a tuple, to be no child of this one.
        self._marlin: tuple[tuple[torch.device, torch.dtype], nn.Module] | None = None

    def _derive(self) -> None:
        """What follows from the file's tensors."""
        self.zeros = unpack_zeros(self.qzeros, self.bits, self.zero_offset)  # uint8 [N, G]
        # Whether every zero point is the middle of the grid.
        self.symmetric = bool((self.zeros == 2 ** (self.bits - 1)).all())
        groups = self.scales.shape[0]
        index, size = self.g_idx.long(), self.in_features // groups
        trivial = torch.arange(self.in_features, device=index.device) // max(size, 1)
        even = bool((torch.bincount(index, minlength=groups) == size).all())
        # Inputs per group, or 0 where groups differ; and where group j is the j-th run of them.
        self.even = size if even else 0
        self.group = size if torch.equal(index, trivial) else 0
        self._choose_form()

    def _choose_form(self) -> None:
        """Here, since torch.compile is not to look into the trial."""
        self.form: Form = "torch" if self.bits == 3 else choose(self.device).form

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, "
            f"groups={self.scales.shape[0]}, kernel={self.kernel}"
        )

    def use(self, kernel: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Run under `kernel` (one of `PRODUCTS`) from now on.

        Args:
            dtype: that inputs will have, which `marlin` packs for; another one makes it pack again.

        Raises:
            SpecError: there is none of that name, or it does not fit this linear or fails when it
                is set up; says why.
        """
        if kernel not in PRODUCTS:
            expected = f"one of {', '.join(PRODUCTS)}"
            raise SpecError("kernel", expected=expected, got=repr(kernel))
        if reason := misfit(self, kernel):
            raise SpecError(f"kernel {kernel}", expected="a linear that it fits", got=reason)
        self._restore()
        if kernel != self.kernel:
            self.few_tokens = ANY_ROWS if kernel == "avx2" else FEW_TOKENS
        self.kernel, self._held, self._marlin = "dequantize", None, None
        if kernel == "marlin":
            try:
                self._marlin_for(self.device, dtype)
            except Exception as error:  # whatever gptqmodel, a compiler or a driver raises
                expected, got = "a kernel that can be set up here", said_of(error)
                raise SpecError("kernel marlin", expected=expected, got=got) from error
        self.kernel = kernel
        if kernel in HELD:
            self._held = self._packed()
            self._replace_by_held()

    @property
    def packings(self) -> int:
        """How often the codes are held: once, or in the file's packing and in the kernel's."""
        beside = self._held is not None and self.qweight is not None
        return 2 if beside or self._marlin is not None else 1

    @property
    def device(self) -> torch.device:
        """Where the linear is."""
        return self.scales.device

    def codes(self) -> Tensor:
        """uint8 [N, K], from whichever packing is held."""
        if self.qweight is not None:
            return unpack_codes(self.qweight, self.bits)
        assert self._held is not None
        out = torch.empty(self.out_features, self.in_features, dtype=torch.uint8)
        for rows, part in self._held.codes(_SPAN):
            out[rows] = part
        return out

    def _replace_by_held(self) -> None:
        """Drops `qweight` where the kernel's packing can be read back; torch's is tried first."""
        made, stored = self._held, self.qweight
        assert made is not None and stored is not None
        if isinstance(made, Avx2) or self._is_read_back(made, stored):
            self.qweight = None
        elif made.device.type == "cpu":
            self._held = self._packed(whole=True)  # nothing that is not understood is put together

    def _is_read_back(self, made: Int4, stored: Tensor) -> bool:
        """Whether torch's packing is understood: it is tried on this one."""
        if made.device.type != "cpu":
            return False
        try:
            made.order = Int4Order.of(self.out_features)
            read = made.codes(_SPAN)
            return all(torch.equal(c, unpack_codes(stored[:, at], self.bits)) for at, c in read)
        except RunError:
            return False

    def _restore(self) -> None:
        """The file's `qweight`, where a kernel's packing stands for it."""
        if self.qweight is None:
            self.qweight = pack_codes(self.codes(), self.bits).to(self.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        self._derive()
        if self.kernel == "avx2" and (why := avx2.unavailable()):  # a pickle from another machine
            self._restore()
            self._give_up(why)

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool, /, *args: Any
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars, *args)
        if self.qweight is None:
            destination[f"{prefix}qweight"] = pack_codes(self.codes(), self.bits)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, /, *more: Any
    ) -> None:
        """The file's tensors again; what was worked out from them is so anew."""
        given = any(key.startswith(prefix) for key in state_dict)
        if given:
            self._restore()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *more)
        if not given:
            return
        kernel, packed_for = self.kernel, self._marlin
        self._derive()
        try:
            self.use(kernel, packed_for[0][1] if packed_for is not None else torch.bfloat16)
        except SpecError as error:  # load_state_dict says it, with the rest
            errors: list[str] = more[-1]
            errors.append(f"{prefix.removesuffix('.')}: {error}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """As for any module, but a change of dtype leaves the file's scales as they are."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self.device != scales.device:
            self._choose_form()
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held: the file's tensors, the unpacked zeros, a kernel's own packing."""
        held = [*self.buffers(), *(self._held.tensors if self._held is not None else ())]
        if self._marlin is not None:
            held += marlin.held(self._marlin[1])
        return sum(t.numel() * t.element_size() for t in held)

    def read_bytes(self, rows: int) -> int:
        """Bytes of weight that one product with `rows` inputs reads, under the kernel that runs."""
        if self.kernel in HELD and rows <= self.few_tokens:
            if self._held is None:
                self._held = self._packed()
            read = self._held.tensors
        elif self.kernel == "marlin":
            assert self.qweight is not None
            read = [self.qweight, self.scales]  # as large in its own packing
        else:
            if self.qweight is not None:
                codes = [self.qweight]
            else:
                assert self._held is not None
                codes = self._held.codes_held
            read = [*codes, self.zeros, self.scales]
            if not self.group:
                read.append(self.g_idx)
        if self.bias is not None:
            read.append(self.bias)
        return sum(t.numel() * t.element_size() for t in read)

    def weight_tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Columns `start` to `stop` of `W.T`, [K, stop - start]: float32's, rounded once."""
        assert self.qweight is not None
        codes, scales = self.qweight[:, start:stop], self.scales[:, start:stop]
        parts = codes, scales, self.zeros[start:stop], self.g_idx
        form: Form = self.form if codes.is_cuda else "torch"  # whatever was moved, and how
        return weights(*parts, self.bits, self.group, dtype, form)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear with the weights that the codes stand for, in `dtype`."""
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        self._restore()
        assert self.qweight is not None
        packed = Packed(self.qweight, self.qzeros, self.scales, self.g_idx)
        weight = dequantize(packed, self.bits, zero_offset=self.zero_offset, dtype=dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] floating -> [..., N], the same dtype."""
        flat = x.reshape(-1, self.in_features)
        wanted = torch.is_grad_enabled() and x.requires_grad
        few = 0 < flat.shape[0] <= self.few_tokens and not wanted
        if few and self.kernel in HELD:
            out = self._by_held(flat)
        elif few and self.kernel == "triton-int4" and self._triton_is_on(flat):
            return self._by_triton(flat).view(*x.shape[:-1], self.out_features)
        elif self._marlin_is_on(x.device) and flat.shape[0] and not wanted:
            out = self._by_marlin(flat)
        else:
            out = self._by_tiles(flat)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _by_tiles(self, x: Tensor) -> Tensor:
        if self.qweight is None and self._held is not None and self._held.device != x.device:
            self._restore()  # the module was moved, the kernel's packing was not
        most = max(_TILE["cuda" if x.is_cuda else "cpu"] // self.in_features, 16)
        most -= most % 16 if x.is_cuda else 0  # parts of tensors that begin where vectors may
        out = x.new_empty(x.shape[0], self.out_features)
        if self.qweight is None:
            assert self._held is not None
            x = self._held.gathered(x)
            for span in self._held.spans(most):
                out[:, slice(*span)] = x @ self._transposed_tile(self._held, span, x.dtype)
            return out
        for start in range(0, self.out_features, most):
            stop = min(start + most, self.out_features)
            out[:, start:stop] = x @ self.weight_tile(start, stop, x.dtype)
        return out

    def _transposed_tile(
        self, held: Int4 | Avx2, span: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """`weight_tile`, from a kernel's packing: [K, stop - start], inputs as it has them."""
        start, stop = span
        size = self.in_features, stop - start
        weight = torch.empty(size, dtype=torch.float32, device=held.device)
        held.read(span, weight)
        grouped = weight.view(-1, self.even, stop - start)
        grouped -= self.zeros[start:stop].t().to(torch.float32).unsqueeze(1)
        grouped *= self.scales[:, start:stop].to(torch.float32).unsqueeze(1)
        return weight.to(dtype)

    def _by_held(self, x: Tensor) -> Tensor:
        if self._held is None or self._held.device != x.device:
            self._restore()  # the module was moved: each device has its own layout
            if why := misfit(self, self.kernel):
                self._give_up(why)
                return self._by_tiles(x)
            self._held = self._packed()
        return self._held.product(x)

    def _give_up(self, why: str) -> None:
        """Products go by tiles from now on."""
        logger.warning("%s goes on under dequantize: %s", self, why)
        self.kernel, self._held = "dequantize", None

    def _triton_is_on(self, x: Tensor) -> bool:
        """Whether it can run there: not after the module was moved to a CPU, which is said."""
        if not x.is_cuda and (why := misfit(self, "triton-int4")):
            self._give_up(why)
            return False
        return True

    def _by_triton(self, x: Tensor) -> Tensor:
        """The product, and the bias."""
        from .int4_triton import few_rows

        assert self.qweight is not None
        half = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(torch.bfloat16)
        zeros = None if self.symmetric else self.zeros.t().contiguous()  # as it lies there
        parts = self.qweight, self.scales, zeros, self.g_idx, self.bias
        out: Tensor = few_rows(half, *parts, self.bits, self.group)
        return out.to(x.dtype)

    def _by_marlin(self, x: Tensor) -> Tensor:
        made = self._marlin_for(x.device, x.dtype)
        assert self._marlin is not None
        out: Tensor = made(x.to(self._marlin[0][1]).contiguous())
        return out.to(x.dtype)

    def _marlin_is_on(self, device: torch.device) -> bool:
        """Whether Marlin runs on inputs there: not after the model was moved to a CPU."""
        return self._marlin is not None and self._marlin[0][0].type == device.type

    def _marlin_for(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        half = dtype if dtype == torch.float16 else torch.bfloat16
        if self._marlin is None or self._marlin[0] != (device, half):
            self._marlin = (device, half), marlin.product(self, half)
        return self._marlin[1]

    def _packed(self, whole: bool = False) -> Int4 | Avx2:
        """As the kernel takes it; `whole` as for `Int4.pack`."""
        gather = None if self.group else torch.argsort(self.g_idx, stable=True)
        if self.kernel == "avx2":
            return self._packed_for_avx2(gather)
        return Int4.pack(self.codes(), self.scales, self.zeros, self.bits, gather, whole)

    def _packed_for_avx2(self, gather: Tensor | None) -> Avx2:
        if self.qweight is not None and self.bits != 3 and gather is None:
            words = self.qweight
        else:
            codes = self.codes() if gather is None else self.codes()[:, gather]
            words = pack_codes(codes, avx2.held_bits(self.bits))
        return Avx2.pack(words, self.scales, self.zeros, self.bits, self.even, gather)


def triton_misfit(linear: QuantLinear) -> str | None:
    """Why `triton-int4` cannot run this linear where it is, or None."""
    if linear.bits == 3:
        return "3 bits, whose codes straddle words"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if linear.device.type != "cuda":
        return f"device {linear.device.type}, the kernel is for cuda"
    if torch.cuda.get_device_capability(linear.device) < (8, 0):
        return "a GPU before compute capability 8.0, which has no bfloat16"
    return None


def misfit(linear: QuantLinear, kernel: str) -> str | None:
    """Why the linear cannot run under the kernel where it is, or None."""
    if kernel == "torch-int4":
        shape = linear.in_features, linear.out_features
        return int4_misfit(linear.bits, linear.even, linear.group > 0, *shape, linear.device)
    if kernel == "avx2":
        return avx2.misfit(linear.bits, linear.even, linear.out_features, linear.device)
    asked = {"triton-int4": triton_misfit, "marlin": marlin.misfit}.get(kernel)
    return asked(linear) if asked else None
