"""The machine, and what a child process costs on it.

Memory is measured the same way for every tool, from outside: `ru_maxrss` of the finished child
(its largest resident set, threads included), and beside it the largest sum over the child's
process tree, polled, split into anonymous pages and pages mapped from files, which the kernel can
drop at will. The caller must stay small and must not import torch: on Linux a child's `ru_maxrss`
starts at what its parent had when it was forked.

A time is worth something only if nothing else ran. What the rest of the machine did meanwhile is
measured too: the processor time of all its processes (and what a hypervisor took), less this one's
and the child's. Linux only, standard library only.
"""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "asimd", "bf16")
"""CPU flags that decide how fast a matmul is, and whether bfloat16 has one of its own."""


@dataclass(frozen=True)
class Cost:
    """What a child took.

    Attributes:
        wall_s: from start to end of the process.
        cpu_s: user and system time of it and its waited-for children.
        max_rss_kib: `ru_maxrss`.
        tree_rss_kib, tree_anon_kib: largest polled sums over its process tree.
        load_before: one-minute load average when it was started.
        others_cores: processors that others kept busy meanwhile, on average (1.0 is a whole one).
        code: its exit code.
    """

    wall_s: float
    cpu_s: float
    max_rss_kib: int
    tree_rss_kib: int
    tree_anon_kib: int
    load_before: float
    others_cores: float
    code: int


def run_measured(
    command: list[str], *, cwd: Path, env: dict[str, str], log: Path, interval: float = 0.1
) -> Cost:
    """Run `command` to its end, all its output to `log`, and say what it took."""
    load = os.getloadavg()[0]
    busy = _busy_seconds() - _own_seconds()
    peak = [0, 0]
    with open(log, "wb") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
        done = threading.Event()

        def poll() -> None:
            while not done.wait(interval):
                rss, anon = _tree_kib(child.pid)
                peak[:] = [max(peak[0], rss), max(peak[1], anon)]

        watcher = threading.Thread(target=poll, daemon=True)
        watcher.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        finally:
            wall = time.perf_counter() - start
            done.set()
            watcher.join()
        busy = _busy_seconds() - _own_seconds() - busy
        child.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(
        wall_s=wall,
        cpu_s=cpu,
        max_rss_kib=usage.ru_maxrss,
        tree_rss_kib=max(peak[0], 0),
        tree_anon_kib=peak[1],
        load_before=load,
        others_cores=round(max(0.0, busy - cpu) / wall, 3),
        code=child.returncode,
    )


def _busy_seconds() -> float:
    """Processor time of the whole machine since it started, idle and waiting for disks left out."""
    fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this process, without its children."""
    times = os.times()
    return times.user + times.system


def _tree_kib(pid: int) -> tuple[int, int]:
    """Resident and anonymous KiB of a process and all below it; what has ended counts nothing."""
    rss = anon = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                rss += int(line.split()[1])
            elif line.startswith("RssAnon:"):
                anon += int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for below in (task / "children").read_text().split():
                more = _tree_kib(int(below))
                rss, anon = rss + more[0], anon + more[1]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return rss, anon


def fastest_dtype() -> str:
    """What a CPU is fastest in, of float32 and bfloat16."""
    flags = describe()["flags"]
    assert isinstance(flags, list)
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def describe() -> dict[str, object]:
    """CPU, cores, the flags that matter, memory, kernel. Nothing that names the machine."""
    model, flags = platform.processor(), set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }
