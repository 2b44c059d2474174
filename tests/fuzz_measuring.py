"""Fuzz targets of what is measured with and what was measured: benchmarks' data, `profile.json`."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from fuzz_target import Run, Target
from made_profile import INT4, made_profile

from qquant.card_results import with_results
from qquant.profile_card import only, section
from qquant.profile_report import render_markdown, render_text
from qquant.reporting import changes, png
from qquant.reporting.charts import charts
from qquant.reporting.page import render_page
from qquant.reporting.protocol import public
from qquant.reporting.schema import NAME, checked, known, read_profile
from qquant.tasks import local

CARD = "---\nlicense: other\n---\n# Title\n"


def _profile(folder: Path) -> tuple[list[bytes], Run]:
    """Report, page, card and comparison."""
    whole = checked(made_profile(2))

    def run(data: bytes) -> None:
        (folder / NAME).write_bytes(data)
        found = read_profile(folder / NAME)
        for text in (render_text(found), render_markdown(found), render_page(found)):
            text.encode()
        for pair in ((found, whole), (whole, found)):
            compared = changes.compare(*pair)
            json.dumps(compared.to_dict(), allow_nan=False), compared.render().encode()
        for model in found["models"]:
            one = only(found, model)
            public(one).encode(), section(known(one)).encode()
            with_results(CARD, known(one), model, "target").encode()

    return [json.dumps(whole).encode(), json.dumps(only(whole, INT4)).encode()], run


def _charts(folder: Path) -> tuple[list[bytes], Run]:
    def run(data: bytes) -> None:
        (folder / NAME).write_bytes(data)
        for chart in charts(known(read_profile(folder / NAME))):
            assert not png.available() or png.draw(chart).startswith(b"\x89PNG")

    return [json.dumps(made_profile(2)).encode()], run


def _data(dataset: str, file: str, *seeds: bytes) -> Callable[[Path], tuple[list[bytes], Run]]:
    """`file` of a benchmark; the other files that belong to it are good ones."""

    def prepare(folder: Path) -> tuple[list[bytes], Run]:
        for name in (file, *_BESIDE.get(file, ())):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(seeds[0])

        def run(data: bytes) -> None:
            (folder / file).write_bytes(data)
            for split in local.rows(str(folder), dataset, "law").values():
                json.dumps(split, ensure_ascii=False).encode()
                assert len({frozenset(row) for row in split}) == 1  # the same columns
                assert len({tuple(map(type, row.values())) for row in split}) == 1

        return list(seeds), run

    return prepare


def _zipped(text: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("dev", "test"):
            archive.writestr(f"data/{split}/law_{split}.csv", text)
    return packed.getvalue()


_BESIDE = {
    "dev/law_dev.csv": ("test/law_test.csv",),
    "val/law_val.csv": ("dev/law_dev.csv",),
    "dev/law.csv": ("test/law.csv",),
    "gsm8k/test.jsonl": ("gsm8k/train.jsonl",),
}
_MMLU = b'"Why, and\nwhat?",1,"2 ""or"" 3",4,5,C\nHow?,a,b,c,d,A\n'
_CEVAL = "\ufeffid,question,A,B,C,D,answer\n0,何为____？,甲,乙,丙,丁,B\n1,何?,1,2,3,4,A\n".encode()
_CMMLU = ",Question,A,B,C,D,Answer\n0,何为？,甲,乙,丙,丁,D\n".encode()
_GSM8K = b'{"question": "How many?", "answer": "1 + 1 = 2\\n#### 2"}\n' * 2
_CODE = {"task_id": "x/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"}
_CODE |= {"test": "def check(f):\n    f()\n", "entry_point": "f"}
_HUMANEVAL = gzip.compress(json.dumps(_CODE).encode() + b"\n", mtime=0)

MEASURING: dict[str, Target] = {
    "profile": Target("json", (NAME,), _profile),
    "profile-charts": Target("json", (NAME,), _charts),
    "data-mmlu": Target(
        "lines", ("law_dev", "{dev,test}"), _data("cais/mmlu", "dev/law_dev.csv", _MMLU)
    ),
    "data-zip": Target("bytes", ("law_",), _data("cais/mmlu", "mmlu.zip", _zipped(_MMLU))),
    "data-ceval": Target(
        "lines", ("law_val", "{dev,val}"), _data("ceval/ceval-exam", "val/law_val.csv", _CEVAL)
    ),
    "data-cmmlu": Target("lines", ("law",), _data("haonan-li/cmmlu", "dev/law.csv", _CMMLU)),
    "data-gsm8k": Target(
        "records", ("test.jsonl", "{train,test}"), _data("openai/gsm8k", "gsm8k/test.jsonl", _GSM8K)
    ),
    "data-humaneval": Target(
        "bytes",
        ("HumanEval.jsonl",),
        _data("openai/openai_humaneval", "HumanEval.jsonl.gz", _HUMANEVAL),
    ),
}
