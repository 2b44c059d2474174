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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

Row = dict[str, Any]
Splits = dict[str, list[Row]]
_LETTERS = "ABCD"


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
                for i, line in enumerate(csv.reader(io.StringIO(text, newline="")), 1)
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
            for row in result[split]:
                row["id"] = int(row["id"]) if row["id"].isdigit() else row["id"]
    return _complete(result, ("dev", "val"), folder, "ceval.zip", f"{subject}_{{dev,val}}.csv")


def _cmmlu(folder: Path, subject: str) -> Splits:
    fields = ("Question", "A", "B", "C", "D", "Answer")
    result: Splits = {}
    for split in ("dev", "test"):
        member = f"{split}/{subject}.csv"
        if (text := _text(folder, ("cmmlu.zip", "cmmlu", "."), member)) is not None:
            result[split] = [{f: r[f] for f in fields} for r in _table(text, member, fields)]
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
                            return archive.read(name).decode("utf-8-sig")
            elif (place / member).is_file():
                raw = (place / member).read_bytes()
                return (gzip.decompress(raw) if member.endswith(".gz") else raw).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _bad(f"{member} in {folder}", "a readable file in UTF-8", error) from error
    return None


def _table(text: str, where: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """A csv file with a header."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if lacking := [field for field in fields if field not in (reader.fieldnames or ())]:
        raise _bad(where, f"columns {', '.join(fields)}", f"none called {lacking[0]}")
    table = list(reader)
    for i, line in enumerate(table, 1):
        if any(line[field] is None for field in fields):
            raise _bad(f"{where}, row {i}", f"{len(fields)} values", line)
    return table


def _lines(text: str, where: str, fields: Sequence[str]) -> list[Row]:
    """A jsonl file; other fields are left out."""
    result = []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            result.append({field: str(row[field]) for field in fields})
        except (ValueError, KeyError, TypeError) as error:
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
