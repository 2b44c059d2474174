"""The processes of one run: which of them this is, and the few things they say to each other.

`torchrun --nproc-per-node 4 -m qquant quantize ...` starts the same command four times. `launched`
reads from the environment which of them this one is, `join` connects them, and what comes out of it
is a `World`, which is handed down to whatever shares out work. A process by itself has a `World`
too, in which everything is what it is without others: it imports nothing and copies nothing. So the
engine asks nowhere whether it is distributed.

**Sums have one order.** A sum over ranks is exchanged, not all-reduced: each rank gets its part of
everybody's numbers, adds them up in the order of the ranks and hands the result out again. That
moves as many bytes as a ring, does not depend on the backend's algorithm, and makes a run equal
itself bit for bit. It goes in panels of `PANEL` bytes, since a Hessian may fill half of a memory;
small sums go together in one, since a mixture of experts has thousands of them.

**Errors are everybody's.** What one rank refuses before work begins is raised in every rank
(`first`, `every`), so that no one waits for one that is gone. Later on a rank that ends closes its
connections; the others' next exchange fails with `RankLostError`, which tells the reason if the
lost rank could leave one. One that neither answers nor closes is given up after a time limit; the
first rank, where it works for long by itself, says now and then that it is there (`tick`).

**An attempt knows nothing of the one before.** torchrun starts all ranks again when one is lost
(`--max-restarts`), and keeps its store. What ranks of now say there has their own prefix (`_meet`).

What is said beside tensors is JSON: no pickle is loaded here either. The engine is PyTorch's own
(gloo on CPUs, nccl on GPUs); nccl has not been run yet. Left out on purpose: what is shared out
(`blocks.py`, `journal.py`, `convert.py`), and starting processes, which is torchrun's.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import errors
from .errors import MissingDependencyError, QQuantError, RankLostError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PANEL = 32 << 20  # bytes of a sum that are exchanged at a time
MINUTES = 30.0  # that a rank waits for the others
_MOST = 30 * 24 * 60.0  # minutes that it may be told to wait: more is a slip
_REASON = "ended"  # in the store: why the first rank that ended did so
_LATE = "no answer within"


@dataclass(frozen=True)
class Seat:
    """Which process of a run this is, as torchrun numbers them.

    Attributes:
        rank: of all; 0 leads: it alone writes and shows anything.
        size: how many there are.
        local_rank, local_size: the same on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.size}"


def launched() -> Seat:
    """This process's seat by torchrun's environment; a process that it did not start has its own.

    Other launchers set some of the same variables, for programs that may not be this one: only
    torchrun's are taken.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if "TORCHELASTIC_RUN_ID" not in os.environ or not all(v.isdigit() for v in values):
        return Seat()
    return Seat(*map(int, values))


class World:
    """A process by itself; `join` gives the one of several.

    Attributes:
        seat: which process this is.
        seconds: spent in exchanges, waiting for others included.
    """

    def __init__(self, seat: Seat = Seat()) -> None:
        self.seat = seat
        self.seconds = 0.0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.seat.rank == 0

    def share(self, count: int, *, back: bool = False) -> slice:
        """This rank's part of `count` things: shares are contiguous and differ by one at most.

        Args:
            back: the last rank's part comes first, so that what is left over goes to others.
        """
        rank = self.seat.size - 1 - self.seat.rank if back else self.seat.rank
        return _share(count, rank, self.seat.size)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first rank, which alone runs it; its error is everybody's.

        Args:
            make: gives what JSON can hold.
        """
        return make()

    def tick(self) -> None:
        """Within what `first` runs: the others, who wait, go on waiting from here."""

    def every(self, make: Callable[[], T]) -> T:
        """What `make` gives here; an error in any rank is raised in every one."""
        return make()

    def collect(self, value: T) -> list[T]:
        """Everybody's value, by rank; values that JSON can hold."""
        return [value]

    def add_up(self, parts: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, added in their order; the same bits in
        every rank.

        Args:
            parts: any shapes (at least one dimension), dtypes and strides, the same in every rank.
        """

    def join_rows(self, mine: Tensor, count: int) -> Tensor:
        """[count, ...]: all ranks' rows, from each rank its `share(count)`."""
        return mine


ALONE = World()


@contextmanager
def join(device: str = "auto", minutes: float = MINUTES) -> Iterator[World]:
    """Connects the processes that torchrun started; alone where it started none or one.

    Args:
        device: `cpu`, or `auto` and `cuda` for a GPU per process where there are GPUs.
        minutes: that a rank waits for the others before it gives up.

    Raises:
        SpecError: a device that they would have to share, or that is not there; no such time.
        RankLostError: not all of them came.
    """
    seat = launched()
    if seat.size == 1:
        yield World()
        return
    if not 0 < minutes <= _MOST:
        raise SpecError(
            "--rank-timeout", expected=f"minutes, more than 0 and at most {_MOST:g}", got=minutes
        )
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if not distributed.is_available():
        raise MissingDependencyError(
            "torch.distributed", got="a build of torch without it", cure="Use one process"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise SpecError(
            "--device",
            expected="auto, cpu or cuda where torchrun starts several processes",
            got=device,
            cure="Each process takes the GPU of its own number; CUDA_VISIBLE_DEVICES chooses them",
        )
    if cuda:
        if seat.local_size > (count := torch.cuda.device_count()):
            raise SpecError(
                f"torchrun: {seat.local_size} processes on this machine",
                expected=f"one for each of its {count} GPUs, at the most",
                got=seat.local_size,
                cure=f"Use --nproc-per-node {count}, or --device cpu",
            )
        torch.cuda.set_device(seat.local_rank)
    limit = timedelta(minutes=minutes)
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
        store = _meet(store, seat, limit)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=seat.rank,
            world_size=seat.size,
            timeout=limit,
        )
    except RuntimeError as error:
        raise RankLostError(
            f"{seat.name}: the other ranks",
            expected=f"all of them within {minutes:g} minutes",
            got=_first_sentence(error),
            cure="Start all of them by one torchrun command; one that ended says why where it ran",
        ) from error
    world = _Ranks(seat, store, minutes)
    try:
        yield world
    except RankLostError:
        raise
    except BaseException as error:
        world.leave_reason(error)
        raise
    finally:
        distributed.destroy_process_group()


class _Ranks(World):
    """One of several processes, connected."""

    def __init__(self, seat: Seat, store: Any, minutes: float) -> None:
        super().__init__(seat)
        self._store, self._minutes = store, minutes
        self._awaited = False  # the others wait for what this one makes

    def first(self, make: Callable[[], T]) -> T:
        value: Any = None
        told: dict[str, Any] = {}
        if self.leads:
            self._awaited = True
            try:
                value = make()
                told = {"value": value}
            except RankLostError:  # found in a tick
                raise
            except QQuantError as error:
                self._tell({"error": _error_to_json(error)})
                raise
            finally:
                self._awaited = False
        told = self._tell(told)
        while "tick" in told:
            told = self._tell({})
        if "error" in told:
            raise _error_from_json(told["error"])
        return value if self.leads else told["value"]  # type: ignore[no-any-return]

    def tick(self) -> None:
        if self._awaited:
            self._tell({"tick": True})

    def every(self, make: Callable[[], T]) -> T:
        value, failed = None, None
        try:
            value = make()
        except QQuantError as error:
            failed = error
        found = self.collect(None if failed is None else _error_to_json(failed))
        for rank, told in enumerate(found):
            if told is not None:
                if failed is not None and rank == self.seat.rank:
                    raise failed
                if any(other != told for other in found):  # one that is not everybody's
                    told["what"] = f"rank {rank}: {told['what']}"
                raise _error_from_json(told)
        return value  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        from torch import distributed as dist

        mine = _to_bytes(value)
        sizes = self._gather(_numbers([mine.numel()]))
        longest = max(int(size) for size in sizes)
        padded = mine.new_zeros(longest)
        padded[: mine.numel()] = mine
        texts = [padded.new_empty(longest) for _ in sizes]
        self._do(lambda: dist.all_gather(texts, padded))
        return [_from_bytes(t[: int(n)]) for t, n in zip(texts, sizes, strict=True)]

    def add_up(self, parts: Sequence[Tensor]) -> None:
        for panel in _panels(parts):
            self._sum(panel)

    def join_rows(self, mine: Tensor, count: int) -> Tensor:
        import torch

        shares = [_share(count, rank, self.seat.size) for rank in range(self.seat.size)]
        sizes = [share.stop - share.start for share in shares]
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: mine.shape[0]] = mine
        found = self._gather(padded)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    def leave_reason(self, error: BaseException) -> None:
        """For the others, who will find this rank gone; the first one's reason is kept."""
        self._leave(str(error) if isinstance(error, QQuantError) else type(error).__name__)

    def _leave(self, text: str) -> None:
        with suppress(RuntimeError):
            self._store.compare_set(_REASON, "", f"rank {self.seat.rank}: {text}")

    def _sum(self, panel: Sequence[Tensor]) -> None:
        """Replaces tensors of one kind by their sums over the ranks, in one exchange."""
        import torch
        from torch import distributed as dist

        size, counts = self.seat.size, [t.numel() for t in panel]
        part = -(-sum(counts) // size)
        padded = panel[0].new_zeros(part * size)
        places = torch.split(padded[: sum(counts)], counts)
        for place, tensor in zip(places, panel, strict=True):
            place.view(tensor.shape).copy_(tensor)
        all_of_mine = padded.new_empty(size, part)
        self._do(lambda: dist.all_to_all_single(all_of_mine.view(-1), padded))
        total = all_of_mine[0].clone()
        for other in all_of_mine[1:]:
            total += other
        found = list(padded.view(size, part))
        self._do(lambda: dist.all_gather(found, total))
        for place, tensor in zip(places, panel, strict=True):
            tensor.copy_(place.view(tensor.shape))

    def _gather(self, mine: Tensor) -> list[Tensor]:
        from torch import distributed as dist

        mine = mine.contiguous()
        found = [mine.new_empty(mine.shape) for _ in range(self.seat.size)]
        self._do(lambda: dist.all_gather(found, mine))
        return found

    def _tell(self, value: dict[str, Any]) -> dict[str, Any]:
        """What the first rank says, in every one."""
        from torch import distributed as dist

        text = _to_bytes(value)
        size = _numbers([text.numel()])
        self._do(lambda: dist.broadcast(size, 0))
        if not self.leads:
            text = text.new_empty(int(size))
        self._do(lambda: dist.broadcast(text, 0))
        told: dict[str, Any] = _from_bytes(text)
        return told

    def _do(self, exchange: Callable[[], Any]) -> None:
        start = time.perf_counter()
        try:
            exchange()
        except RuntimeError as error:
            self._lost(error)
        finally:
            self.seconds += time.perf_counter() - start

    def _lost(self, error: RuntimeError) -> NoReturn:
        late = any(words in str(error).lower() for words in ("timed out", "timeout"))
        reason = "none" if late else _first_sentence(error)
        with suppress(RuntimeError):
            if self._store.check([_REASON]):
                reason = self._store.get(_REASON).decode()
        if late:  # this rank ends by that, and others by its end
            self._leave(f"{_LATE} {self._minutes:g} minutes")
        cure = "Blocks that were kept are gone on with by the same command"
        if late or _LATE in reason:
            above = f"--rank-timeout above {self._minutes:g}"
            cure = f"Give {above} where a rank has that much to do by itself. {cure}"
        raise RankLostError(
            f"{self.seat.name}: another rank {'does not answer' if late else 'is lost'}",
            expected=f"an answer within {self._minutes:g} minutes",
            got=reason,
            cure=cure,
        ) from error


def _meet(store: Any, seat: Seat, limit: timedelta) -> Any:
    """The store with the keys of this attempt alone, once all ranks are there.

    What an earlier attempt left are addresses where nobody is, and the reason of an end that is
    past. torchrun counts attempts, but each machine its own failures only. So the first rank names
    the attempt: each other asks under a name that was never there, and is told until it says so.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    mine = secrets.token_hex(8)
    if seat.rank > 0:
        store.set(f"qquant/asks/{seat.rank}", mine)
        store.wait([f"qquant/told/{mine}"], limit)
        attempt = store.get(f"qquant/told/{mine}").decode()
        store.set(f"qquant/{attempt}/{seat.rank}", "here")
        return PrefixStore(f"qquant/{attempt}", store)
    away, end = list(range(1, seat.size)), time.monotonic() + limit.total_seconds()
    while away:
        for rank in away:
            if store.check([asks := f"qquant/asks/{rank}"]):
                store.set(f"qquant/told/{store.get(asks).decode()}", mine)
        away = [rank for rank in away if not store.check([f"qquant/{mine}/{rank}"])]
        if away and time.monotonic() > end:
            raise RuntimeError(f"nothing from rank {', '.join(map(str, away))}")
        time.sleep(0.01)
    return PrefixStore(f"qquant/{mine}", store)


def _share(count: int, rank: int, size: int) -> slice:
    return slice(rank * count // size, (rank + 1) * count // size)


def _panels(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views of all the parts, in their order; as many together as go into a panel of one kind."""
    import torch

    panel: list[Tensor] = []
    room = 0
    for part in parts:
        of_row = max(1, part[0].numel() * part.element_size())
        for view in torch.split(part, max(1, PANEL // of_row)):
            need = len(view) * of_row
            alike = panel and (panel[0].dtype, panel[0].device) == (view.dtype, view.device)
            if not alike or need > room:
                if panel:
                    yield panel
                panel, room = [], PANEL
            panel.append(view)
            room -= need
    if panel:
        yield panel


def _numbers(values: list[int]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int64)


def _to_bytes(value: Any) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))


def _error_to_json(error: QQuantError) -> dict[str, Any]:
    told = {key: getattr(error, key) for key in ("what", "expected", "got", "cure")}
    return {"kind": type(error).__name__} | {
        key: None if value is None else errors.shown(value) for key, value in told.items()
    }


def _error_from_json(told: dict[str, Any]) -> QQuantError:
    kind = getattr(errors, told["kind"], errors.RunError)
    error: QQuantError = kind(
        told["what"], expected=told["expected"], got=told["got"], cure=told["cure"]
    )
    return error


def _first_sentence(error: BaseException) -> str:
    """Without the place in the backend's sources before it, and the advice after it."""
    text = (str(error).splitlines() or [""])[0]
    return text.partition("] ")[2].partition(". ")[0] if text.startswith("[") else text
