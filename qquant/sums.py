"""`SHA256SUMS`: a hash of every file of a directory, for people who do not have qquant.

The format is that of coreutils, so `sha256sum -c SHA256SUMS` checks a download. The manifest has
hashes too, but cannot have its own; this file is written last and covers everything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from .directory import contained, sha256_file, sha256_files
from .errors import CheckpointError

NAME = "SHA256SUMS"
_MOST = 16 << 20  # bytes; a directory of 100,000 files has less
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def write_sums(directory: Path, known: Mapping[str, str]) -> None:
    """Writes `SHA256SUMS` over all other files of the directory.

    Args:
        known: hashes of files that have not changed since they were taken, by name relative to the
            directory; the others are read.
    """
    files = [p for p in directory.rglob("*") if p.is_file()]
    names = sorted(p.relative_to(directory).as_posix() for p in files)
    lines = [
        f"{known.get(name) or sha256_file(directory / name)}  {name}\n"
        for name in names
        if name != NAME
    ]
    (directory / NAME).write_text("".join(lines), encoding="utf-8")


def renew_sums(directory: Path, names: Collection[str], gone: Collection[str] = ()) -> None:
    """Takes the hashes of `names` anew, drops those of `gone`, and leaves all others as they are.

    The file is written beside and renamed, so that a hard link to it elsewhere stays as it was.

    Raises:
        CheckpointError: the `SHA256SUMS` that is there cannot be read.
    """
    found = {name: digest for name, digest in read_sums(directory).items() if name not in gone}
    digests = sha256_files([directory / name for name in names])
    found |= {name: digests[directory / name] for name in names}
    text = "".join(f"{found[name]}  {name}\n" for name in sorted(found))
    fresh = directory / f".{NAME}.new"
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, directory / NAME)


def read_sums(root: Path) -> dict[str, str]:
    """The hashes by file name.

    Raises:
        CheckpointError: the file is missing, cannot be read, or has a line of another form.
    """
    path = contained(root, NAME)
    cure = "Download the file again."
    try:
        if (size := path.stat().st_size) > _MOST:
            raise CheckpointError(f"{NAME}: size", expected=f"at most {_MOST}", got=size, cure=cure)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{NAME} of {root}", expected="text", got=error, cure=cure) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if not match or match[2] in found:
            raise CheckpointError(
                f"{NAME}, line {number}",
                expected="64 hexadecimal digits, two blanks and a name not there before",
                got=repr(line[:100]),
                cure=cure,
            )
        found[match[2]] = match[1].lower()
    return found
