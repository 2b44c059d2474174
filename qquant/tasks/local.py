"""Benchmarks' data in the files that their authors published, as rows that lm-eval's tasks expect.

lm-eval takes data sets from the hub. Without it, `rows` reads the original files from a folder and
gives each row the fields of the hub's data set of the same questions; prompts and scoring are then
lm-eval's own. A data set may lie as an archive or unpacked:

    MMLU       mmlu.zip, mmlu/ or data/   {dev,val,test}/SUBJECT_{split}.csv, without a header
    C-Eval     ceval.zip or ceval/        {dev,val,test}/SUBJECT_{split}.csv
    CMMLU      cmmlu.zip or cmmlu/        {dev,test}/SUBJECT.csv
    GSM8K      gsm8k/                     {train,test}.jsonl, or .jsonl.gz
    HumanEval  HumanEval.jsonl or .jsonl.gz

Whether the hub's copy has the same questions as the file is not known here; for the same rows the
prompts are the same, which a test holds.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import InputError

Row = dict[str, Any]
Splits = dict[str, list[Row]]
_LETTERS = ("A", "B", "C", "D")
_MOST = 256 << 20  # bytes of a file, unpacked; the largest of the originals has 9 MB
_DAMAGED = (
    *(OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError),  # a zip with other compression, or encrypted
)


def known(dataset: str | None) -> bool:
    """Whether the data set of this hub name can be read from files."""
    return dataset in _READERS


def rows(folder: str, dataset: str, name: str | None) -> Splits:
    """The splits of a data set, by the hub's names of data set, configuration and splits.

    Args:
        folder: where the files are, in one of the forms above.
        dataset: such as `cais/mmlu`; `known` says which. name: the configuration: the subject.

    Raises:
        InputError: the files are not there, or a line is not what it should be.
    """
    reader = _READERS[dataset]
    found = reader(Path(folder), name or "")
    return {split: list(lines) for split, lines in found.items() if lines}


def _mmlu(folder: Path, subject: str) -> Splits:
    places = ("mmlu.zip", "mmlu", "data", "mmlu/data", ".")
    result: Splits = {}
    for split, file in (("dev", "dev"), ("validation", "val"), ("test", "test")):
        member = f"{file}/{subject}_{file}.csv"
        if (text := _text(folder, places, member)) is not None:
            result[split] = [
                _mmlu_row(line, subject, f"{member}, row {i}")
                for i, line in enumerate(_records(csv.reader, text, member), 1)
                if line
            ]
    return _complete(result, ("dev", "test"), folder, "mmlu.zip", f"{subject}_{{dev,test}}.csv")


def _mmlu_row(line: Sequence[str], subject: str, where: str) -> Row:
    if len(line) != 6 or line[5].strip() not in _LETTERS:
        raise _bad(where, "question, four choices and a letter A to D", line)
    return {
        "question": line[0],
        "subject": subject,
        "choices": list(line[1:5]),
        "answer": _LETTERS.index(line[5].strip()),
    }


def _ceval(folder: Path, subject: str) -> Splits:
    fields = ("id", "question", "A", "B", "C", "D", "answer", "explanation")
    result: Splits = {}
    for split in ("dev", "val", "test"):
        member = f"{split}/{subject}_{split}.csv"
        if (text := _text(folder, ("ceval.zip", "ceval", "."), member)) is not None:
            table = _table(text, member, fields[1:6] if split == "test" else fields[1:7])
            result[split] = [{f: line.get(f) or "" for f in fields} for line in table]
            if all(row["id"].isdecimal() and len(row["id"]) < 10 for row in result[split]):
                for row in result[split]:
                    row["id"] = int(row["id"])
            for i, row in enumerate(result[split] if split != "test" else (), 1):
                _check_letter(row["answer"], f"{member}, row {i}")  # the test's are not published
    return _complete(result, ("dev", "val"), folder, "ceval.zip", f"{subject}_{{dev,val}}.csv")


def _cmmlu(folder: Path, subject: str) -> Splits:
    fields = ("Question", "A", "B", "C", "D", "Answer")
    result: Splits = {}
    for split in ("dev", "test"):
        member = f"{split}/{subject}.csv"
        if (text := _text(folder, ("cmmlu.zip", "cmmlu", "."), member)) is not None:
            result[split] = [{f: r[f] for f in fields} for r in _table(text, member, fields)]
            for i, row in enumerate(result[split], 1):
                _check_letter(row["Answer"], f"{member}, row {i}")
    return _complete(result, ("dev", "test"), folder, "cmmlu.zip", f"{{dev,test}}/{subject}.csv")


def _gsm8k(folder: Path, _: str) -> Splits:
    result: Splits = {}
    for split in ("train", "test"):
        for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
            if (text := _text(folder, ("gsm8k",), name)) is not None:
                result[split] = _lines(text, name, ("question", "answer"))
    return _complete(result, ("train", "test"), folder, "gsm8k", "{train,test}.jsonl")


def _humaneval(folder: Path, _: str) -> Splits:
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    result: Splits = {}
    for name in ("HumanEval.jsonl", "HumanEval.jsonl.gz"):
        if (text := _text(folder, (".", "humaneval"), name)) is not None:
            result["test"] = _lines(text, name, fields)
    return _complete(result, ("test",), folder, ".", "HumanEval.jsonl.gz")


_READERS: Mapping[str, Callable[[Path, str], Splits]] = {
    "cais/mmlu": _mmlu,
    "ceval/ceval-exam": _ceval,
    "haonan-li/cmmlu": _cmmlu,
    "openai/gsm8k": _gsm8k,
    "openai/openai_humaneval": _humaneval,
}


def _text(folder: Path, places: Sequence[str], member: str) -> str | None:
    """The file `member` in the first of `places` that has it."""
    try:
        for place in (folder / name for name in places):
            if place.suffix == ".zip" and place.is_file():
                with zipfile.ZipFile(place) as archive:
                    for name in archive.namelist():
                        if name == member or name.endswith("/" + member):
                            with archive.open(name) as file:
                                return _decoded(file)
            elif (place / member).is_file():
                opened: Any = gzip.GzipFile if member.endswith(".gz") else io.FileIO
                with opened(place / member) as unpacked:
                    return _decoded(unpacked)
    except _DAMAGED as error:
        raise _bad(f"{member} in {folder}", "a readable file in UTF-8", error) from error
    return None


def _decoded(file: IO[bytes]) -> str:
    raw = file.read(_MOST + 1)
    if len(raw) > _MOST:
        raise ValueError(f"more than {_MOST >> 20} MiB")
    return raw.decode("utf-8-sig")


def _check_letter(answer: str, where: str) -> None:
    if answer not in _LETTERS:
        raise _bad(where, "an answer A to D", repr(answer))


def _records(reader: Callable[[IO[str]], Iterable[Any]], text: str, where: str) -> Iterator[Any]:
    """What csv's `reader` makes of the text."""
    try:
        yield from reader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise _bad(where, "a csv file", error) from error


def _table(text: str, where: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """A csv file with a header."""
    header: list[str] = next(_records(csv.reader, text, where), [])
    if lacking := [field for field in fields if field not in header]:
        raise _bad(where, f"columns {', '.join(fields)}", f"none called {lacking[0]}")
    table = list(_records(csv.DictReader, text, where))
    for i, line in enumerate(table, 1):
        if any(line[field] is None for field in fields):
            raise _bad(f"{where}, row {i}", f"{len(fields)} values", line)
    return table


def _lines(text: str, where: str, fields: Sequence[str]) -> list[Row]:
    """A jsonl file; other fields are left out."""
    result = []
    for i, line in enumerate(text.split("\n"), 1):  # JSON's strings may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = {field: str(row[field]) for field in fields}
            "".join(values.values()).encode()  # half a surrogate pair could not be written
            result.append(values)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _bad(f"{where}, line {i}", f"JSON with {', '.join(fields)}", error) from error
    return result


def _complete(found: Splits, needed: Sequence[str], folder: Path, place: str, files: str) -> Splits:
    for split in needed:
        if not found.get(split):
            raise InputError(
                f"--data-dir {folder}",
                expected=f"{files} in {place}",
                got=f"no questions of the split {split}",
                cure="Put the original files there, or leave --data-dir out to use the hub",
            )
    return found


def _bad(where: str, expected: str, got: object) -> InputError:
    return InputError(where, expected=expected, got=got, cure="Fetch the original file again")
