"""Compiles Triton's kernels for an H200, which needs none, and prints what they take as JSON.

A process of its own: Triton must not be under its interpreter, as it is in `triton_process.py`.

    python tests/triton_compiled.py
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qquant.columns_triton import _descent, _gptq
from qquant.int4_kernels import added, alone, product, several
from qquant.int4_triton import _tile
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
    """Registers of a thread, bytes that do not fit into them, bytes of shared memory, and
    instructions of the longest loop."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, check=True).stderr.decode()
        command = [knobs.nvidia.cuobjdump.path, "-sass", cubin]
        code = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    found = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    numbers = {name: int(re.findall(pattern, said)[0]) for name, pattern in found.items()}
    back = re.findall(r"/\*([0-9a-f]{4,})\*/.*\bBRA\b.*0x([0-9a-f]+) ;", code)
    loops = [(int(at, 16) - int(to, 16)) // 16 + 1 for at, to in back]  # of 16 bytes each
    return numbers | {"shared": kernel.metadata.shared, "loop": max([0, *loops])}


def kernels() -> dict[str, Any]:
    """All of them, by case."""
    found = {}
    for bits, bfloat in itertools.product((2, 4, 8), (True, False)):
        case = f"{bits} bits, bfloat16 {bfloat}"
        dtype = "*bf16" if bfloat else "*fp16"
        same = {"BITS": bits, "BFLOAT": bfloat}
        for n in (1024, 65536):
            outputs, rows, warps = _tile(n, bits, processors=132)
            fixed = {"WORDS": rows, "OUTPUTS": outputs, "BIAS": True, "MIDDLE": bfloat}
            fixed |= same | {"RUN": 128 * bits // 32}
            kinds = KINDS | {"x": "*i32", "out": dtype}
            found[f"alone, {warps} warps, {case}"] = made(alone, kinds, fixed, num_warps=warps)
        for group, middle in ((32, not bfloat), (128, bfloat)):
            words = group * bits // 32
            fixed = {"ROWS": 16, "WORDS": words, "OUTPUTS": 64, "WIDEN": False}
            fixed |= same | {"RUN": words, "MIDDLE": middle}
            kinds = KINDS | {"x": dtype, "out": "*fp32"}
            found[f"several, groups of {group}, {case}"] = made(several, kinds, fixed)
    for bits in (2, 4, 8):
        fixed = {"BITS": bits, "ROWS": 16, "WORDS": 16, "OUTPUTS": 64, "WIDEN": False}
        kinds = KINDS | {"x": "*bf16", "out": "*fp32"}
        found[f"product, {bits} bits"] = made(product, kinds, fixed)
        fixed = {"BITS": bits, "WORDS": 8, "OUTPUTS": 128, "zeros_row": 1}
        found[f"rebuild, {bits} bits"] = made(_rebuild, KINDS | {"out": "*bf16"}, fixed)
    fixed = {"BIAS": True, "MANY": 512}
    found["added"] = made(added, KINDS | {"sums": "*fp32", "out": "*bf16"}, fixed)
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
