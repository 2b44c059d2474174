"""Where calibration text comes from: a name on the command line in, documents out.

Owns the names (`builtin`, `self`, `hf:NAME`, a path, each with an optional `=WEIGHT`), the bytes
(gzip, byte order marks, invalid UTF-8) and the choice between JSON, JSON lines and plain text. That
choice is made from the content: what parses as records is records, whatever the file is called, and
`.json`/`.jsonl` files that do not parse are refused and not read as prose. Nothing is repaired: a
byte that is no UTF-8 is named by its offset, since calibrating on mojibake would cost accuracy
without a word.

Leaves out the layouts of records (`formats`) and everything about tokens. `self` has no documents:
`tokens` asks the model for it. No network is touched except for `hf:`, and `datasets` is imported
only then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, MissingDependencyError, QQuantError
from .formats import LAYOUTS, Document, Records, Text, read_records

BUILTIN = "builtin"
SELF = "self"
HF = "hf:"
# A text document longer than this is cut at a paragraph or line, so that the seeded shuffle
# samples the whole of a book and not only its opening. About four thousand tokens of English:
# several rows of the default length, so few rows see a cut.
PIECE_CHARS = 16_384
# Bytes of a file, packed and unpacked: far more than any calibration reads, and a few times as much
# memory is what parsing it takes. A gzip file of 1 MB can hold 1 GB.
MOST_BYTES = 1 << 30
# Rows read from a data set of the hub, as a stream: enough for any calibration, and the 300 GB ones
# stay where they are.
HF_ROWS = 20_000

_BOMS = (  # UTF-32's mark begins with UTF-16's, so it is looked for first
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_FOREIGN = (
    (b"PAR1", "a parquet file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "a PDF"),
    (b"\x80\x02", "a pickle"),
)
_WEIGHT = 1e6  # at most, and one part in that at least
_PIECE = 1 << 12  # bytes: what follows a gzip member in its piece is copied for each member
_ZEROS = re.compile(rb"\0*")
_OR_BUILTIN = "or use the builtin set, which needs no file (leave --calib out)"


@dataclass(frozen=True)
class Source:
    """A name to read, with its share.

    Attributes:
        name: `builtin`, `self`, `hf:NAME[:SPLIT]` or a path.
        weight: its share of the rows, relative to the other sources' weights.
    """

    name: str
    weight: float = 1.0

    @property
    def label(self) -> str:
        """How records and manifests call it: paths by their last part only, since a published
        manifest should not tell the directory layout of the machine that made it."""
        return _base(self.name) if self.is_path else self.name

    @property
    def place(self) -> str:
        """What tells it from others however a path is spelled."""
        try:
            return os.path.realpath(self.name) if self.is_path else self.name
        except ValueError:  # no name that a file can have
            return self.name

    @property
    def is_path(self) -> bool:
        """Whether it is a file of this machine."""
        return self.name not in (BUILTIN, SELF) and not is_hub(self.name)


@dataclass(frozen=True)
class SourceData:
    """What a source held.

    Attributes:
        format: the layout, as in `formats.Records`; `text` for plain text.
        documents: in file order.
        sha256: of the file's bytes as they lie on disk; for `hf:` of the rows as canonical JSON.
        skipped: records with nothing in them.
        prose: the documents are pieces of one text (see `pieces`).
    """

    format: str
    documents: tuple[Document, ...]
    sha256: str
    skipped: int = 0
    prose: bool = False


def is_hub(name: str) -> bool:
    """Whether the source is a data set of the hub."""
    return name.startswith(HF)


def _base(name: str) -> str:
    return Path(name).name or name


def parse_sources(names: Sequence[str]) -> tuple[Source, ...]:
    """`("chat.json=2", "builtin")` -> sources with weights 2 and 1.

    A file whose own name ends in `=NUMBER` is taken as it is when it exists.

    Raises:
        CalibrationError: a weight is not a positive number (or beyond 1e-6 to 1e6), a name is empty
            or given twice, or two files have the same name but for their folders.
    """
    out: list[Source] = []
    for given in names:
        name, weight = given, 1.0
        match = re.fullmatch(r"(.*)=([^=/]*)", given, flags=re.DOTALL)
        if match and not os.path.exists(given):
            name = match[1]
            try:
                weight = float(match[2])
            except ValueError:
                weight = math.nan
            if not 1 / _WEIGHT <= weight <= _WEIGHT:  # nor NaN
                raise CalibrationError(
                    f"calibration source {given!r}: its weight cannot be used",
                    expected="SOURCE=WEIGHT with a positive number, 1e-6 to 1e6",
                    got=repr(match[2]),
                    cure="Write for example chat.json=2.",
                )
        if not name.strip():
            raise CalibrationError(
                f"calibration source {given!r} has no name",
                expected="builtin, self, hf:NAME or a path",
                cure="Name a file, " + _OR_BUILTIN + ".",
            )
        source = Source(name, weight)
        if any(source.place == other.place for other in out):
            raise CalibrationError(
                f"calibration source {name!r} is given twice",
                expected="each source once",
                cure=f"Give it once, with a larger weight: {name}=2.",
            )
        if any(source.label == other.label for other in out):
            raise CalibrationError(
                f"calibration source {name!r}",
                expected="files of different names",
                got="another one of that name",
                cure="Rename one: the manifest names them without their folders",
            )
        out.append(source)
    return tuple(out)


def read_source(name: str) -> SourceData:
    """Read the documents of `builtin`, `hf:NAME[:SPLIT]` or a path.

    Raises:
        CalibrationError: the file is missing, unreadable, empty, of a foreign layout or encoding;
            the data set cannot be had.
        MissingDependencyError: `hf:` without `datasets` installed.
    """
    if name == BUILTIN:
        data = resources.files(__package__).joinpath("builtin.jsonl").read_bytes()
        return _from_bytes(data, "builtin.jsonl", BUILTIN)
    if is_hub(name):
        return _from_hub(name)
    path = Path(name)
    with _told(name):
        _check_kind(path)
        data = _read(path)
    _check_size(data, name)
    return _from_bytes(data, path.name, name)


def find_source(name: str) -> None:
    """Refuses a source that is not there, by name alone: nothing is read.

    Raises:
        CalibrationError: no such file, or no file. MissingDependencyError: as for `read_source`.
    """
    if is_hub(name):
        _need_datasets(name)
    elif name not in (BUILTIN, SELF):
        with _told(name):
            _check_kind(Path(name))


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise CalibrationError(
            f"calibration source {str(path)!r} is a directory",
            expected="a file",
            cure="Name the files in it, each as a source of its own.",
        )
    if stat.S_ISCHR(path.stat().st_mode):  # /dev/zero has no end
        raise CalibrationError(
            f"calibration source {str(path)!r} is a device", expected="a file or a pipe"
        )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the system refuses becomes an error that names the source."""
    try:
        yield
    except FileNotFoundError:
        raise CalibrationError(
            f"calibration source {name!r} does not exist",
            expected="a file, builtin, self or hf:NAME",
            cure=f"Check the path, {_OR_BUILTIN}.",
        ) from None
    except (OSError, ValueError) as err:  # a name with a zero character
        raise CalibrationError(
            f"calibration source {name!r} cannot be read",
            got=getattr(err, "strerror", None) or err,
            cure=f"Check its permissions, {_OR_BUILTIN}.",
        ) from err


def _read(path: Path) -> bytes:
    """The file, or the beginning of one that is too large; by pieces, as pipes have no size."""
    data = bytearray()
    with path.open("rb") as handle:
        while len(data) <= MOST_BYTES and (piece := handle.read(1 << 20)):
            data += piece
    return bytes(data)


def _check_size(data: bytes, where: str) -> None:
    if len(data) > MOST_BYTES:
        raise CalibrationError(
            f"calibration source {where!r} is too large",
            expected=f"at most {MOST_BYTES >> 20:,} MiB, unpacked",
            cure="Give a part of it: calibration reads a few megabytes of text.",
        )


def _gunzip(data: bytes, where: str) -> bytes:
    """What a gzip file holds: its members, one after the other; zeros may follow, as tools pad.

    Raises:
        CalibrationError: it is damaged, or too large.
    """
    parts: list[bytes] = []
    room, at, view = MOST_BYTES + 1, 0, memoryview(data)
    try:
        while at < len(view) and room:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            while not member.eof and room:
                if at == len(view):
                    raise EOFError("it ends too early")
                piece = view[at : at + _PIECE]
                parts.append(member.decompress(piece, room))
                room -= len(parts[-1])
                at += len(piece) - len(member.unused_data) - len(member.unconsumed_tail)
            if member.eof:
                at = _ZEROS.match(view, at).end()  # type: ignore[union-attr]
    except (EOFError, zlib.error) as err:
        raise CalibrationError(
            f"calibration source {where!r} is a damaged gzip file",
            got=str(err),
            cure="Fetch it again, or unpack it and see what is left.",
        ) from err
    whole = b"".join(parts)
    _check_size(whole, where)
    return whole


def _from_bytes(data: bytes, filename: str, where: str) -> SourceData:
    digest = hashlib.sha256(data).hexdigest()
    text = decode(data, where)
    if not text.strip():
        raise CalibrationError(
            f"calibration source {where!r} is empty",
            expected="text or records",
            got=f"{len(data)} bytes without a visible character",
            cure=f"Give a file with data, {_OR_BUILTIN}.",
        )
    suffix = Path(filename.lower().removesuffix(".gz")).suffix
    records = _records(text, where, suffix)
    if records is None:
        return SourceData("text", tuple(Text(p) for p in pieces(text)), digest, prose=True)
    return _finished(records, where, digest)


def _finished(records: Records, where: str, digest: str) -> SourceData:
    documents: list[Document] = []
    for document in records.documents:
        if isinstance(document, Text):
            documents += [Text(piece) for piece in pieces(document.text)]
        else:
            documents.append(document)
    if not documents:
        raise CalibrationError(
            f"calibration source {where!r} has nothing to read",
            expected="at least one record with text in it",
            got=f"{records.skipped} empty records",
            cure=f"Give a file with data, {_OR_BUILTIN}.",
        )
    return SourceData(records.format, tuple(documents), digest, records.skipped)


def decode(data: bytes, where: str) -> str:
    """Bytes of a file as text: gzip opened, UTF-8 with or without mark, UTF-16/32 by their mark.

    Raises:
        CalibrationError: damaged gzip, another kind of file, or bytes that are not that encoding
            (the offset in the unpacked data is named).
    """
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, where)
    for magic, kind in _FOREIGN:
        if data.startswith(magic):
            raise CalibrationError(
                f"calibration source {where!r} is {kind}",
                expected="text, JSON or JSON lines",
                cure='Export its text to a .jsonl file with a "text" or "messages" field.',
            )
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as err:
        offset = err.start + (3 if encoding == "utf-8-sig" else 0)
        raise CalibrationError(
            f"calibration source {where!r} is not valid {encoding} at byte {offset}",
            expected="UTF-8, or UTF-16 with a byte order mark",
            got=f"byte 0x{data[offset]:02x} ({err.reason})" if offset < len(data) else err.reason,
            cure="Save it as UTF-8 (iconv -f ENCODING -t UTF-8), or mend that byte.",
        ) from err
    if (nul := text.find("\0")) >= 0:
        raise CalibrationError(
            f"calibration source {where!r} has a zero character at position {nul}",
            expected="text",
            got="binary data, or UTF-16 without a byte order mark",
            cure="Save it as UTF-8.",
        )
    return text.removeprefix("\ufeff")


def pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text at paragraphs (else lines, else anywhere) into pieces of at most `size`
    characters; joined they are the text again, but for pieces that would be white space only."""
    start = 0
    while len(text) - start > size:
        window = text[start : start + size]
        cut = window.rfind("\n\n", size // 2)
        cut = cut + 2 if cut >= 0 else window.rfind("\n", size // 2) + 1
        if cut <= 0:
            cut = window.rfind(" ", size // 2)
        if cut <= 0:
            cut = size
        if text[start : start + cut].strip():
            yield text[start : start + cut]
        start += cut
    if text[start:].strip():
        yield text[start:]


def _records(text: str, where: str, suffix: str) -> Records | None:
    """The records in `text`, or None where it is prose."""
    is_json = suffix in (".json", ".jsonl", ".ndjson")
    if text.lstrip()[0] not in "[{":
        if is_json:
            raise CalibrationError(
                f"calibration source {where!r} is not JSON",
                expected=LAYOUTS,
                got=f"a file that begins with {text.strip()[:20]!r}",
                cure="Rename it to .txt if it is plain text.",
            )
        return None
    try:
        whole = _parse(text)
    except json.JSONDecodeError as err:
        return _lines(text, where, is_json, err)
    records = whole if isinstance(whole, list) else [whole]
    if not is_json and not (records and isinstance(records[0], dict)):
        return None  # prose or numbers in brackets, in a file that does not claim to be JSON
    return read_records(records, repr(where))


def _parse(text: str) -> Any:
    """`json.loads` with one kind of error for all that it refuses."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", text, 0) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses integers of more than 4300 digits
        raise json.JSONDecodeError("a number of too many digits", text, 0) from None


def _lines(text: str, where: str, is_json: bool, whole: json.JSONDecodeError) -> Records | None:
    """JSON lines, where the file as a whole is no JSON value."""
    lines = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    records: list[object] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except json.JSONDecodeError as err:
            if not records:
                if not is_json:
                    return None
                raise CalibrationError(
                    f"calibration source {where!r} is not JSON at line {whole.lineno}, column "
                    f"{whole.colno}",
                    expected="a JSON list of records, or one record per line",
                    got=whole.msg,
                    cure="Mend that place; the file may have been cut short.",
                ) from err
            if not is_json and not isinstance(records[0], dict):
                return None
            raise CalibrationError(
                f"calibration source {where!r}, line {number}: not JSON",
                expected="one record per line",
                got=f"{err.msg} at column {err.colno}",
                cure="Mend or remove that line; the file may have been cut short.",
            ) from err
        numbers.append(number)
    if not is_json and not isinstance(records[0], dict):
        return None
    unit = "line" if numbers == list(range(1, len(numbers) + 1)) else "record"
    return read_records(records, repr(where), unit)


def _need_datasets(name: str) -> None:
    known = "datasets" in sys.modules  # whatever stands there; else what would be found
    there = sys.modules["datasets"] if known else importlib.util.find_spec("datasets")
    if there is None:
        raise MissingDependencyError(
            f"calibration source {name!r} needs the datasets package",
            got="it is not installed",
            cure=f"pip install 'qquant[hf]' (or pip install datasets), {_OR_BUILTIN}.",
        )


def _from_hub(name: str) -> SourceData:
    """`hf:NAME[:SPLIT]` or `hf:NAME:CONFIG:SPLIT`, streamed through `datasets`."""
    parts = name[len(HF) :].split(":")
    if not parts[0] or len(parts) > 3:
        raise CalibrationError(
            f"calibration source {name!r} cannot be read",
            expected="hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT",
            cure="For example hf:OWNER/DATASET:train.",
        )
    config = parts[1] if len(parts) == 3 else None
    split = parts[-1] if len(parts) > 1 else "train"
    _need_datasets(name)
    import datasets

    rows: list[Any] = []
    digest = hashlib.sha256()
    try:
        # Whatever another package raises here (no network, no such name, a gated set, a wrong
        # split) the user's cure is the same, so all of it becomes one kind with the cause in its
        # text.
        stream = datasets.load_dataset(parts[0], config, split=split, streaming=True)
        for row in stream:
            rows.append(row)
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            if len(rows) == HF_ROWS:
                break
    except QQuantError:
        raise
    except Exception as err:
        detail = str(err).strip().splitlines()
        raise CalibrationError(
            f"data set {parts[0]!r} (split {split!r}) cannot be had",
            got=f"{type(err).__name__}{': ' + detail[0] if detail else ''}",
            cure="Check the name, the split and the network; offline, download it beforehand "
            f"(hf download --repo-type dataset) and give the file, {_OR_BUILTIN}.",
        ) from err
    return _finished(read_records(rows, repr(name), "row"), name, digest.hexdigest())
