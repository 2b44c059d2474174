"""Ranks as torchrun starts them, forked from one process that has its imports behind it.

Each line on stdin asks for a run, as JSON: `size`, and per rank what is called (`calls`, one for
all or a list). A rank gets torchrun's environment, calls what it is told to and leaves what came of
it in a file; the answer on stdout is a list with the exit code and that, by rank. torchrun itself
is too slow to start for every test (`test_distributed.py` has one that does). Runs whose calls name
the same `store` share one, as the attempts of `torchrun --max-restarts` do.
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
from torch.distributed import TCPStore

import qquant.methods
import qquant.models.qwen.modeling_qwen
from qquant import blocks, convert, world
from qquant.calibration.hold import Holder
from qquant.cli import cli
from qquant.config import CalibrationSpec, QuantSpec
from qquant.errors import QQuantError, RunError
from qquant.events import Event, Kept, Resumed


def quantize(call: dict[str, Any]) -> dict[str, Any]:
    """`qquant.quantize` of `src` to `dst`; in the middle of block `kill` or `fail` it does that.

    `at`: of the block, the linear in front of which it does. `tokens`: the shape of random ids.
    `slow`: seconds that measuring bits takes longer per block and pass. `leaves`: killed when the
    blocks are done.
    """
    original = blocks.Blocks._solve_and_write
    make_holder = convert.make_holder
    holders: list[tuple[int, Holder]] = []
    tokens = None
    if "tokens" in call:
        generator = torch.Generator().manual_seed(call.get("seed", 0))
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

    blocks.Blocks._solve_and_write = solve
    measure, publish = convert.measure, convert._Run._publish

    def measure_slowly(*args: Any, progress: Any = lambda _: None, **more: Any) -> Any:
        def wait(block: int) -> None:
            time.sleep(call["slow"])
            progress(block)

        return measure(*args, progress=wait, **more)

    def leave(self: Any, work: Any) -> Any:
        if "leaves" in call:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(self, work)

    if "slow" in call:
        convert.measure = measure_slowly
    convert._Run._publish = leave  # type: ignore[method-assign]
    events: list[Event] = []
    with world.join("cpu", call.get("minutes", 5.0)) as together:
        result = qquant.methods.quantize(
            call["src"],
            call["dst"],
            QuantSpec(**{"group_size": 32, **call.get("spec", {})}),
            CalibrationSpec(**call.get("calib", {})),
            device="cpu",
            tokens=tokens,
            world=together,
            compute_dtype=call.get("compute_dtype", "auto"),
            progress=events.append,
        )
    ((foreseen, holder),) = holders
    resumed = [e.block for e in events if isinstance(e, Resumed)]
    found = {"path": str(result.path), "resumed": resumed, "linears": len(result.layers)}
    found["kept"] = [e.block for e in events if isinstance(e, Kept)]
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


def attempt(call: dict[str, Any]) -> dict[str, Any]:
    """Comes after `late` seconds, and fails with `fail` or is killed where it says so."""
    time.sleep(call.get("late", 0))
    with world.join("cpu", call.get("minutes", 0.5)) as together:
        ranks = together.collect(together.seat.rank)
        if "fail" in call:
            raise RunError("the test", got=call["fail"])
        if "kill" in call:
            os.kill(os.getpid(), signal.SIGKILL)
        together.collect(0)
    return {"ranks": ranks}


def alone(call: dict[str, Any]) -> dict[str, Any]:
    """The first rank works by itself for `parts` seconds; with `ticks` it says so."""
    with world.join("cpu", call["minutes"]) as together:
        together.tick()  # nobody waits

        def work() -> str:
            for _ in range(call["parts"]):
                time.sleep(1)
                if call["ticks"]:
                    together.tick()
            return "done"

        made = together.first(work)
        together.tick()
        return {"made": [made, *together.collect(made)]}


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
    size, calls = request["size"], request["calls"]
    call = calls[rank] if isinstance(calls, list) else dict(calls)
    environment = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "store" in call,
        **call.get("environment", {}),
    }
    os.environ.update({k: str(v) for k, v in environment.items()})
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
    stores: dict[str, TCPStore] = {}
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        calls = request["calls"]
        if name := (calls[0] if isinstance(calls, list) else calls).get("store"):
            if name not in stores:
                stores[name] = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port = stores[name].port
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
