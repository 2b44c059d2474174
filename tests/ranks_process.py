"""Ranks as torchrun starts them, forked from one process that has its imports behind it.

Each line on stdin asks for a run, as JSON: `size`, and per rank what is called (`calls`, one for
all or a list). A rank gets torchrun's environment, calls what it is told to and leaves what came of
it in a file; the answer on stdout is a list with the exit code and that, by rank. torchrun itself
is too slow to start for every test (`test_distributed.py` has one that does).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401 (so that no rank imports it)

import qquant.methods
import qquant.models.qwen.modeling_qwen
from qquant import blocks, convert, world
from qquant.calibration.hold import Holder
from qquant.cli import cli
from qquant.config import CalibrationSpec, QuantSpec
from qquant.errors import QQuantError, RunError
from qquant.events import Resumed


def quantize(call: dict[str, Any]) -> dict[str, Any]:
    """`qquant.quantize` of `src` to `dst`; in the middle of block `kill` or `fail` it does that.

    `at`: of the block, the linear in front of which it does. `tokens`: the shape of random ids.
    `compute_dtype`: as in `quantize`.
    """
    original = blocks.Blocks._solve_group
    make_holder = convert.make_holder
    holders: list[tuple[int, Holder]] = []
    tokens = None
    if "tokens" in call:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 256, call["tokens"], generator=generator)

    def watch(needs: Any, *args: Any, **more: Any) -> Holder:
        holders.append((needs.waiting, make_holder(needs, *args, **more)))
        return holders[-1][1]

    convert.make_holder = watch

    def solve(self: Any, block: Any, index: int, arrival: Any) -> Any:
        if call.get("at", arrival.names[0]) != arrival.names[0]:
            return original(self, block, index, arrival)
        if index == call.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if index == call.get("fail"):
            raise RunError("the test", got="a failure")
        return original(self, block, index, arrival)

    blocks.Blocks._solve_group = solve
    resumed: list[int] = []
    with world.join("cpu", call.get("minutes", 5.0)) as together:
        result = qquant.methods.quantize(
            call["src"],
            call["dst"],
            QuantSpec(**{"group_size": 32, **call.get("spec", {})}),
            CalibrationSpec(**call.get("calib", {})),
            device="cpu",
            compute_dtype=call.get("compute_dtype", "auto"),
            tokens=tokens,
            world=together,
            progress=lambda e: isinstance(e, Resumed) and resumed.append(e.block),
        )
    ((foreseen, holder),) = holders
    found = {"path": str(result.path), "resumed": resumed, "linears": len(result.layers)}
    return {**found, "foreseen": foreseen, "held": holder.peak_bytes}


def add_up(call: dict[str, Any]) -> dict[str, Any]:
    """Sums over ranks: of a transposed matrix that each makes from its own seed, and of counts."""
    world.PANEL = call["panel"]
    with world.join("cpu", 5.0) as together:
        generator = torch.Generator().manual_seed(together.seat.rank)
        found = torch.randn(*call["shape"], generator=generator).T
        counts = torch.arange(3) + together.seat.rank
        twice = 2 * found[0]
        together.add_up([twice, found, counts])
        rows = together.join_rows(found[together.share(found.shape[0])], found.shape[0])
        told = together.collect({"rank": together.seat.rank, "text": "x" * together.seat.rank})
    sums = {"sum": found.tolist(), "counts": counts.tolist(), "twice": twice.tolist()}
    return {**sums, "rows": rows.tolist(), "told": told}


def silent(call: dict[str, Any]) -> dict[str, Any]:
    """Waits for one that has come and says nothing any more."""
    with world.join("cpu", call["minutes"]) as together:
        together.collect(0)
        if together.seat.rank == 1:
            time.sleep(12)
        start = time.monotonic()
        try:
            together.collect(0)
        except QQuantError as error:
            if together.seat.rank == 0:
                return {"text": str(error), "seconds": time.monotonic() - start}
            raise
    return {}


def command(call: dict[str, Any]) -> dict[str, Any]:
    """The command line, with what it said."""
    with contextlib.ExitStack() as stack:
        for name, stream in (("out", 1), ("err", 2)):
            file = stack.enter_context(open(f"{call['said']}.{name}", "w"))
            os.dup2(file.fileno(), stream)
        code = 0
        try:
            cli.main(call["words"], prog_name="qquant")
        except SystemExit as error:
            code = int(error.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        said = {n: Path(f"{call['said']}.{n}").read_text() for n in ("out", "err")}
    return {"code": code, **said}


def be_rank(request: dict[str, Any], rank: int, port: int, file: Path) -> None:
    size = request["size"]
    environment = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({k: str(v) for k, v in environment.items()})
    calls = request["calls"]
    call = calls[rank] if isinstance(calls, list) else dict(calls)
    call.setdefault("said", str(file))
    try:
        told = globals()[call["call"]](call)
    except QQuantError as error:
        told = {"error": type(error).__name__, "text": str(error)}
    except BaseException:
        told = {"bug": traceback.format_exc()}
    file.write_text(json.dumps(told))


def serve(folder: Path) -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        children = []
        for rank in range(request["size"]):
            file = folder / f"{number}-{rank}"
            if (child := os.fork()) == 0:
                be_rank(request, rank, port, file)
                os._exit(0)
            children.append((child, file))
        answers = []
        for child, file in children:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answers.append({"exit": code, **(json.loads(file.read_text()) if not code else {})})
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
