"""One environment per tool, made from pinned requirements, kept outside the repository.

The peers want versions of transformers that exclude each other, so each gets a virtual
environment of its own; qquant gets one, too, with what it depends on and nothing beside (a
development environment has readers' packages in it that transformers imports at start, some
seconds that no user of qquant waits for). It is named after a hash of its requirement files, so
that a change of pins makes a new one and an old one is never half updated. torch is installed
first, by itself (see `requirements/torch.txt`). Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
PEERS = ("gptqmodel", "llmcompressor", "autoround")
TOOLS = ("qquant", *PEERS)


def cache_dir() -> Path:
    """Where environments are kept: `qquant-benchmarks` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qquant-benchmarks"


def ensure(tool: str, cache: Path) -> Path:
    """The python of `tool`'s environment, made first if it is not there (minutes, about 1.6 GB).

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on the terminal.
    """
    files = [REQUIREMENTS / "torch.txt", REQUIREMENTS / f"{tool}.txt"]
    tag = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:10]
    home = cache / f"{tool}-py{sys.version_info[0]}{sys.version_info[1]}-{tag}"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        for file in files:
            pip = [str(python), "-m", "pip", "install", "--quiet", "-r", str(file)]
            subprocess.run(pip, check=True)
        complete.touch()
    return python
