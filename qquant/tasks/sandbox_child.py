"""The child's half of `sandbox`: locks itself in, then runs the program. Standard library only.

Run as `python -I sandbox_child.py` with an order in JSON on stdin; prints one JSON object of `kind`
(`passed`, `failed`, `unavailable`) and `text`. The process that reads the order stays outside the
new PID namespace, so that it can end the program whatever that does. What follows the fork, in this
order: mounts, limits, capabilities away, seccomp, program.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import select
import signal
import sys
from typing import Any

# Numbers of Linux's include/uapi.
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, RET_ALLOW, RET_ERRNO = 2, 0x7FFF0000, 0x00050000
CLONE_THREAD = 0x10000
MOUNT_SETATTR, CLONE3 = 442, 435  # the same on every architecture, as all from 424 on
NEW_MOUNT_API, IO_URING_SETUP = (428, 429, 430, 431, 432, 433, MOUNT_SETATTR), 425
# (audit name, clone, what is refused: socket, fork, vfork, ptrace, mount, umount2, unshare, setns,
# process_vm_readv, process_vm_writev, bpf, keyctl)
ARCHITECTURES = {
    "x86_64": (0xC000003E, 56, (41, 57, 58, 101, 165, 166, 272, 308, 310, 311, 321, 250)),
    "aarch64": (0xC00000B7, 220, (198, 117, 40, 39, 97, 268, 270, 271, 280, 219)),
}


class _Unavailable(Exception):
    """The sandbox cannot be had here."""


def main() -> None:
    order = json.load(sys.stdin)
    read, write = os.pipe()
    try:
        if sys.platform != "linux":
            raise _Unavailable(f"{sys.platform}, not Linux")
        if platform.machine() not in ARCHITECTURES:
            raise _Unavailable(f"no list of system calls for {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        _call(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _namespaces(libc)
    except (_Unavailable, OSError) as error:
        _say("unavailable", str(error))
        return
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _inside(order, libc, write)
    os.close(write)
    watched = os.pidfd_open(pid)
    in_time = select.select([watched], [], [], order["seconds"])[0]
    os.kill(pid, signal.SIGKILL)  # of the first process of a PID namespace: ends all in it
    os.waitpid(pid, 0)
    found = os.read(read, 4096)
    if not in_time:
        _say("failed", "timed out")
    elif not found:
        _say("failed", "killed, as when memory runs out, or left by os._exit")
    else:
        print(found.decode("utf-8", "replace"), flush=True)


def _say(kind: str, text: str) -> None:
    print(json.dumps({"kind": kind, "text": text[:500]}), flush=True)


def _call(result: int, what: str) -> None:
    if result != 0:
        raise _Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")


def _namespaces(libc: Any) -> None:
    user, group = os.geteuid(), os.getegid()
    _call(libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {user} 1"),
        ("gid_map", f"65534 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _inside(order: dict[str, Any], libc: Any, write: int) -> None:
    """The first process of the new PID namespace; does not return."""
    try:
        for fd in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        try:
            _lock_in(order, libc)
        except (_Unavailable, OSError, ValueError) as error:
            found = {"kind": "unavailable", "text": str(error)[:500]}
        else:
            found = _execute(order["program"], order["token"])
        os.write(write, json.dumps(found).encode())
    finally:
        os._exit(0)


def _execute(program: str, token: str) -> dict[str, str]:
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    except BaseException as error:
        try:
            return {"kind": "failed", "text": f"{type(error).__name__}: {error}"[:500]}
        except BaseException:
            return {"kind": "failed", "text": "an exception that cannot be shown"}
    return {"kind": "passed", "text": token}


def _lock_in(order: dict[str, Any], libc: Any) -> None:
    import resource

    _call(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    folder = os.fsencode(order["folder"])
    _call(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    wanted = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(wanted), size)
    _call(done, "read-only files (mount_setattr, Linux 5.12)")
    options = f"size={order['disk_bytes']},nr_inodes=4096,mode=700".encode()
    _call(libc.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount tmpfs")
    _call(libc.mount(b"tmpfs", b"/proc", b"tmpfs", MS_RDONLY, b"size=4096"), "mount over /proc")
    os.chdir(folder)
    os.environ.clear()
    os.environ["TMPDIR"] = order["folder"]
    for limit, value in (
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, order["memory_bytes"]),
    ):
        resource.setrlimit(limit, (value, value))
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(libc.capset(ctypes.byref(header), ctypes.byref(none)), "capset")
    _call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _seccomp(libc)


def _seccomp(libc: Any) -> None:
    """Refuses processes, sockets, namespaces, mounts and a look into other processes."""
    audit, clone, refused = ARCHITECTURES[platform.machine()]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, offsets in seccomp_data
    deny, allow = RET_ERRNO | errno.EPERM, RET_ALLOW
    rules = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, deny)]
    rules += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # not x32 either
    for number in (*refused, *NEW_MOUNT_API, IO_URING_SETUP):
        rules += [(equal, 0, 1, number), (give, 0, 0, deny)]
    # The C library falls back to clone, whose flags can be looked at.
    rules += [(equal, 0, 1, CLONE3), (give, 0, 0, RET_ERRNO | errno.ENOSYS)]
    rules += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD)]
    rules += [(give, 0, 0, deny), (give, 0, 0, allow)]

    class Rule(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),
            ("if_false", ctypes.c_uint8),
            ("k", ctypes.c_uint32),
        )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("rules", ctypes.POINTER(Rule)))

    array = (Rule * len(rules))(*(Rule(*rule) for rule in rules))
    program = Program(len(rules), ctypes.cast(array, ctypes.POINTER(Rule)))
    done = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    _call(done, "seccomp")


if __name__ == "__main__":
    main()
