"""An interpreter that has imported what quantizing needs and done nothing else; forks run scripts.

A fork of it begins as a fresh process does, without the seconds that the imports take (with every
extra installed, longer than most runs of tests). It starts no thread and computes nothing. What
interpreters differ by, such as hash seeds, two of these differ by. Requests are lines of JSON on
stdin, answers lines of JSON on stdout; `fresh.Interpreter` speaks to it.

    {"script": "print(1)", "words": [], "seconds": null}  ->  {"code": 0, "out": "1\\n", "err": ""}

With `seconds` the process is killed with -9 after them, unless it has ended by then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NoReturn

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import qquant.convert
import qquant.models.qwen.modeling_qwen  # noqa: F401


def become(script: str, words: list[str], out: int, err: int) -> NoReturn:
    """Be `python -c SCRIPT WORDS...` from here on."""
    code = 0
    for standard, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, standard)
    sys.argv = ["-c", *words]
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer(script: str, words: list[str], seconds: float | None) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if (child := os.fork()) == 0:
            become(script, words, out.fileno(), err.fileno())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # not waited for yet: the number is still its own
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read(), "err": err.read()}


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
