"""Compiles Triton's kernels for an H200, which needs none, and prints what they take as JSON.

A process of its own: Triton must not be under its interpreter, as it is in `triton_process.py`.

    python tests/triton_compiled.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from itertools import product
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qquant.columns_triton import _descent, _gptq
from qquant.int4_triton import _added, _alone, _product, _several, _tile
from qquant.rebuild_triton import _rebuild

KINDS = {"qweight": "*i32", "scales": "*fp16", "zeros": "*u8", "index": "*i32", "bias": "*fp16"}
COLUMNS = (
    dict.fromkeys("wanted weights coupling scales zeros moved pull h factors".split(), "*fp32")
    | dict.fromkeys("inverses lows highs".split(), "*fp32")
    | {"group": "*i32", "maxq": "fp32"}
)


def made(kernel: Any, kinds: dict[str, str], fixed: dict[str, Any], **options: Any) -> Any:
    """A compiled kernel, as for a linear of a model: whatever is a number is a multiple of 16."""
    kinds = {p.name: kinds.get(p.name, "i32") for p in kernel.params}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if name not in fixed and kind[0] in "*i"
    }
    source = ASTSource(kernel, kinds | dict.fromkeys(fixed, "constexpr"), fixed, even)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def taken(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes that do not fit into them, bytes of shared memory."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, check=True)
    said = done.stderr.decode()
    found = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    numbers = {name: int(re.findall(pattern, said)[0]) for name, pattern in found.items()}
    return numbers | {"shared": kernel.metadata.shared}


def kernels() -> dict[str, Any]:
    """All of them, by case."""
    found = {}
    for bits, bfloat in product((2, 4, 8), (True, False)):
        case = f"{bits} bits, bfloat16 {bfloat}"
        dtype = "*bf16" if bfloat else "*fp16"
        run = 128 * bits // 32
        same = {"BITS": bits, "RUN": run, "MIDDLE": bfloat, "BFLOAT": bfloat}
        for n in (1024, 65536):
            outputs, rows, warps = _tile(n, bits, processors=132)
            fixed = same | {"BIAS": True, "WORDS": rows, "OUTPUTS": outputs}
            kinds = KINDS | {"x": "*i32", "out": dtype}
            alone = made(_alone, kinds, fixed, num_warps=warps)
            found[f"alone, {warps} warps, {case}"] = alone
        fixed = same | {"ROWS": 16, "WORDS": run, "OUTPUTS": 64, "WIDEN": False}
        found[f"several, {case}"] = made(_several, KINDS | {"x": dtype, "out": "*fp32"}, fixed)
    for bits in (2, 4, 8):
        fixed = {"BITS": bits, "ROWS": 16, "WORDS": 16, "OUTPUTS": 64, "WIDEN": False}
        found[f"product, {bits} bits"] = made(
            _product, KINDS | {"x": "*bf16", "out": "*fp32"}, fixed
        )
        fixed = {"BITS": bits, "WORDS": 8, "OUTPUTS": 128, "zeros_row": 1}
        found[f"rebuild, {bits} bits"] = made(_rebuild, KINDS | {"out": "*bf16"}, fixed)
    fixed = {"BIAS": True, "MANY": 512}
    found["added"] = made(_added, KINDS | {"sums": "*fp32", "out": "*bf16"}, fixed)
    fixed = {"WHOLE": 1.5 * 2.0**23, "WIDE": 128, "ROWS": 32}
    settings = {"num_warps": 8, "enable_fp_fusion": False}
    codes = {"codes": "*u8"}
    found["gptq"] = made(_gptq, COLUMNS | codes, fixed | {"SINGLE": True}, **settings)
    found["descent"] = made(_descent, COLUMNS | {"codes": "*fp32"}, fixed, **settings)
    return found


if __name__ == "__main__":
    everything = kernels()
    numbers = {case: taken(kernel) for case, kernel in everything.items()}
    # What happens in which order, before it is the processor's.
    order = re.findall(r"tt\.load|barrier|tt\.store", everything["descent"].asm["ttir"])
    print(json.dumps({"taken": numbers, "descent": order}))
