"""Reading calibration data: each layout, each encoding, a clear message for what is neither."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import timeit
import types
from pathlib import Path

import pytest

from qquant.calibration.formats import Chat, Message, Text
from qquant.calibration.sources import (
    PIECE_CHARS,
    Source,
    SourceData,
    parse_sources,
    pieces,
    read_source,
)
from qquant.errors import CalibrationError, MissingDependencyError

DATA = Path(os.environ.get("QQUANT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here; set QQUANT_DATA to the folder that has it")
    return str(path)


def write(tmp_path: Path, name: str, content: object) -> str:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return str(path)


def lines(records: list[object]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def turns(data: SourceData, index: int = 0) -> list[tuple[str, str]]:
    document = data.documents[index]
    assert isinstance(document, Chat)
    return [(m.role, m.content) for m in document.messages]


# ---- names and weights


def test_sources_carry_their_weights() -> None:
    assert parse_sources(("builtin", "a/b.json=2", "hf:o/n:train=0.5", "self=1e-1")) == (
        Source("builtin", 1.0),
        Source("a/b.json", 2.0),
        Source("hf:o/n:train", 0.5),
        Source("self", 0.1),
    )


def test_a_file_whose_name_ends_like_a_weight_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "run=3", "some text")
    assert parse_sources((path,)) == (Source(path, 1.0),)
    assert parse_sources((path + "=2",)) == (Source(path, 2.0),)


def test_labels_do_not_tell_the_directory() -> None:
    assert Source("/home/someone/chat.json").label == "chat.json"
    assert Source("hf:owner/name").label == "hf:owner/name"
    assert Source("builtin").label == "builtin"


@pytest.mark.parametrize(
    "bad",
    ["x.json=0", "x.json=-1", "x.json=nan", "x.json=", "x.json=two", "x.json=1e308", "x.json=1e-9"],
)
def test_a_weight_that_is_no_positive_number_is_refused(bad: str) -> None:
    with pytest.raises(CalibrationError, match=r"weight.*chat\.json=2"):
        parse_sources((bad,))


def test_a_file_is_the_same_however_its_path_is_spelled(tmp_path: Path) -> None:
    one, other = tmp_path / "chat.json", tmp_path / "more" / "chat.json"
    for path in (one, other):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    with pytest.raises(CalibrationError, match="given twice"):
        parse_sources((str(one), f"{tmp_path}/./chat.json"))
    with pytest.raises(CalibrationError, match=r"different names.*manifest"):
        parse_sources((str(one), str(other)))
    with pytest.raises(CalibrationError, match="different names"):
        parse_sources(("builtin", str(tmp_path / "builtin")))


def test_a_source_given_twice_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"'builtin' is given twice.*builtin=2"):
        parse_sources(("builtin", "builtin=3"))


# ---- layouts


def test_qwen_sft(tmp_path: Path) -> None:
    record = {
        "id": "identity_0",
        "conversations": [
            {"from": "assistant", "value": "left over"},
            {"from": "user", "value": "你好"},
            {"from": "assistant", "value": "你好！"},
        ],
    }
    data = read_source(write(tmp_path, "sft.json", [record]))
    assert data.format == "qwen-sft"
    # a leading turn that is not the user's is dropped, as in Qwen's run_gptq.py
    assert turns(data) == [("user", "你好"), ("assistant", "你好！")]


def test_what_comes_before_the_first_question_goes_with_a_system_text_too(tmp_path: Path) -> None:
    turns_ = [("gpt", "left over"), ("observation", "x"), ("human", "Hi"), ("gpt", "Hello")]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns_]}
    for more, first in (({}, []), ({"system": "S"}, [("system", "S")])):
        data = read_source(write(tmp_path, "cut.json", [record | more]))
        assert turns(data) == [*first, ("user", "Hi"), ("assistant", "Hello")]


def test_half_a_pair_within_arguments_is_named(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": "\\ud800"}'}}
    record = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant"}]}
    record["messages"][1]["tool_calls"] = [call]
    with pytest.raises(CalibrationError, match=r"record 1, turn 2: 'arguments'.*surrogate"):
        read_source(write(tmp_path, "calls.json", [record]))


def test_sharegpt_with_system_tools_and_observations(tmp_path: Path) -> None:
    record = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": "12 C"},
            {"from": "gpt", "value": "12 degrees."},
        ],
    }
    data = read_source(write(tmp_path, "share.jsonl", lines([record, record])))
    assert data.format == "sharegpt" and len(data.documents) == 2
    assert turns(data) == [
        ("system", "Be brief."),
        ("user", "Weather?"),
        ("assistant", '{"name": "weather"}'),
        ("tool", "12 C"),
        ("assistant", "12 degrees."),
    ]


def test_an_unknown_role_is_refused_by_name(tmp_path: Path) -> None:
    good = {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}
    bad = {"conversations": [{"from": "user", "value": "a"}, {"from": "narrator", "value": "b"}]}
    path = write(tmp_path, "x.json", [good, bad])
    with pytest.raises(CalibrationError, match=r"record 2, turn 2: role 'narrator'.*Rename"):
        read_source(path)


def test_alpaca(tmp_path: Path) -> None:
    records = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {
            "instruction": "Say hi.",
            "input": "",
            "output": "Hi.",
            "system": "S",
            "history": [["q", "a"]],
        },
        {"instruction": "", "input": "", "output": "x"},
    ]
    data = read_source(write(tmp_path, "alpaca.json", records))
    assert (data.format, len(data.documents), data.skipped) == ("alpaca", 2, 1)
    assert turns(data, 0) == [("user", "Add.\n1 2"), ("assistant", "3")]
    assert turns(data, 1) == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Say hi."),
        ("assistant", "Hi."),
    ]


def test_openai_messages_with_parts_and_tool_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    record = {
        "messages": [
            {"role": "developer", "content": "S"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "done"},
        ]
    }
    for name, content in (("m.json", [record]), ("m.jsonl", lines([record])), ("one.json", record)):
        data = read_source(write(tmp_path, name, content))
        assert data.format == "openai" and len(data.documents) == 1
        document = data.documents[0]
        assert isinstance(document, Chat)
        assert document.messages == (
            Message("system", "S"),
            Message("user", "ab"),
            Message("assistant", "", (("f", '{"x": 1}'),)),
            Message("tool", "1"),
            Message("assistant", "done"),
        )


def test_an_image_part_is_refused_with_its_type(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    with pytest.raises(CalibrationError, match=r"record 1, turn 1: 'content'.*'image_url'.*Remove"):
        read_source(write(tmp_path, "m.json", [record]))


def test_prompts_become_one_document_per_turn(tmp_path: Path) -> None:
    data = read_source(write(tmp_path, "p.jsonl", lines([{"turns": ["a", "b"]}, {"turns": ["c"]}])))
    assert data.format == "prompts"
    assert [turns(data, i) for i in range(3)] == [[("user", x)] for x in "abc"]


def test_jsonl_text_and_gzip(tmp_path: Path) -> None:
    raw = lines([{"text": "one"}, {"text": "  "}, {"text": "zwei\u2028drei"}]).encode()
    data = read_source(write(tmp_path, "t.jsonl.gz", gzip.compress(raw)))
    assert data.format == "text" and data.skipped == 1
    assert data.documents == (Text("one"), Text("zwei\u2028drei"))


def test_members_of_gzip_and_zeros_between_them(tmp_path: Path) -> None:
    words = [f"word {i} " * (1 + i % 900) for i in range(2000)]
    packed = b"".join(gzip.compress(w.encode(), 1) + b"\0" * (i % 3) for i, w in enumerate(words))
    data = read_source(write(tmp_path, "t.txt.gz", packed))
    assert "".join(d.text for d in data.documents if isinstance(d, Text)) == "".join(words)
    with pytest.raises(CalibrationError, match="damaged gzip"):
        read_source(write(tmp_path, "t.txt.gz", packed[:-9]))


def test_many_small_members_of_gzip_take_no_long(tmp_path: Path) -> None:
    """What follows a member is not copied for each: the work is as the file's length."""

    def seconds(count: int) -> float:
        path = write(tmp_path, "t.txt.gz", gzip.compress(b"a ") * count)
        return min(timeit.repeat(lambda: read_source(path), number=1, repeat=3))

    assert seconds(64_000) < 3 * 8 * seconds(8_000)


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    data = read_source(write(tmp_path, "chat.txt", lines([{"text": "one"}, {"text": "two"}])))
    assert data.documents == (Text("one"), Text("two"))
    for prose in ("[Intro]\nA song.", "{braces} first", "[1, 2, 3]", "[1]\nA note.", "[1]\n[2]"):
        data = read_source(write(tmp_path, "prose.txt", prose))
        assert data.format == "text" and data.documents == (Text(prose),)


def test_long_text_is_cut_without_loss(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of a long book.\n" + "\n" * (i % 7 == 0) for i in range(4000))
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert all(len(p) <= PIECE_CHARS for p in parts) and len(parts) > 5
    assert all(p.endswith("\n\n") for p in parts[:-1])
    assert "".join(pieces("x" * 50_000)) == "x" * 50_000
    assert len(read_source(write(tmp_path, "book.md", text)).documents) == len(parts)


# ---- encodings


def test_marks_and_encodings(tmp_path: Path) -> None:
    want = (Text("héllo 世界"),)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert (
            read_source(write(tmp_path, "t.txt", "héllo 世界".encode(encoding))).documents == want
        )
    for name, mark in (("utf-16-be", b"\xfe\xff"), ("utf-16-le", b"\xff\xfe")):
        raw = mark + "héllo 世界".encode(name)
        assert read_source(write(tmp_path, "t.txt", raw)).documents == want


@pytest.mark.parametrize(("mark", "offset"), [(b"", 5), (b"\xef\xbb\xbf", 8)])
def test_an_invalid_byte_is_named_by_its_offset(tmp_path: Path, mark: bytes, offset: int) -> None:
    path = write(tmp_path, "latin.txt", mark + b"abc d\xe9f and more")
    with pytest.raises(CalibrationError, match=rf"at byte {offset}:.*0xe9.*UTF-8"):
        read_source(path)


def test_an_odd_utf16_file_names_its_end(tmp_path: Path) -> None:
    path = write(tmp_path, "u.txt", "abc".encode("utf-16-le").join((b"\xff\xfe", b"x")))
    with pytest.raises(CalibrationError, match=r"not valid utf-16 at byte 8"):
        read_source(path)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.parquet", b"PAR1\x00\x00", "parquet"),
        ("a.zip", b"PK\x03\x04....", "zip archive"),
        ("a.pkl", b"\x80\x02}q\x00.", "pickle"),
        ("a.txt", "ab".encode("utf-16-le"), "zero character at position 1"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:20], "damaged gzip"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-6] + b"\0" * 6, "damaged gzip"),
    ],
)
def test_foreign_bytes_are_named(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    with pytest.raises(CalibrationError, match=said) as caught:
        read_source(write(tmp_path, name, raw))
    assert caught.value.cure and caught.value.exit_code == 2


# ---- files that cannot be used


@pytest.mark.parametrize("content", ["", " \n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(CalibrationError, match=r"is empty.*builtin"):
        read_source(write(tmp_path, "e.txt", content))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", [], r"holds no records.*builtin"),
        (
            "x.json",
            [{"prompt": "a", "completion": "b"}],
            r"record 1 is in no layout.*'prompt', 'com",
        ),
        ("x.json", [{"text": "a"}, {"txt": "b"}], r"record 2 is in no layout.*keys 'txt'"),
        ("x.json", [{"text": "a"}, {"turns": ["b"]}], r"record 2 differs.*'text'.*'prompts'"),
        ("x.json", [{"role": "user", "content": "a"}], r"bare turns.*\{\"messages\""),
        ("x.json", [3], r"record 1 is in no layout.*a JSON int"),
        ("x.json", "hello", r"is not JSON.*'hello'.*\.txt"),
        ("x.json", '[{"text": "a"},', r"not JSON at line 1, column 16.*cut short"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', r"line 2: not JSON.*cut short"),
        ("x.jsonl", '{"text": "a"}\n{"t": 1}\n', r"line 2 is in no layout.*keys 't'"),
        ("x.json", [{"conversations": []}], r"nothing to read.*1 empty records"),
        ("x.json", [{"conversations": [{"from": "user"}]}], r"turn 1 of 'conversations' lacks"),
        ("x.json", [{"messages": [{"role": "user", "content": 5}]}], r"'content' is not text.*int"),
        ("x.json", [{"instruction": "a", "output": "b", "history": [["q"]]}], r"'history' entry 1"),
        ("x.json", [{"instruction": "a", "output": None}], r"record 1: 'output' is not text"),
    ],
)
def test_foreign_content_names_the_place_and_the_keys(
    tmp_path: Path, name: str, content: object, said: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_source(write(tmp_path, name, content))
    assert re.search(said, str(caught.value)), str(caught.value)
    assert caught.value.cure


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"does not exist.*builtin"):
        read_source(str(tmp_path / "nowhere.json"))
    with pytest.raises(CalibrationError, match=r"is a directory.*Name the files"):
        read_source(str(tmp_path))


# ---- hf:


def fake_datasets(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[object, ...]]:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        if isinstance(answer, Exception):
            raise answer
        return iter(answer)  # type: ignore[call-overload]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_data_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_datasets(monkeypatch, [{"text": "a"}, {"text": "b"}])
    data = read_source("hf:owner/name")
    assert data.documents == (Text("a"), Text("b")) and len(data.sha256) == 64
    read_source("hf:owner/name:test")
    read_source("hf:owner/name:config:test")
    assert asked == [
        ("owner/name", None, "train", True),
        ("owner/name", None, "test", True),
        ("owner/name", "config", "test", True),
    ]


def test_foreign_hub_rows_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, [{"sentence": "a"}])
    with pytest.raises(CalibrationError, match=r"hf:owner/name', row 1 .*keys 'sentence'"):
        read_source("hf:owner/name")
    fake_datasets(monkeypatch, ConnectionError("no route to host"))
    with pytest.raises(CalibrationError, match=r"ConnectionError: no route.*offline.*builtin"):
        read_source("hf:owner/name")


def test_without_datasets_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"qquant\[hf\]"):
        read_source("hf:owner/name")


def test_the_real_datasets_package_offline() -> None:
    pytest.importorskip("datasets", reason="the hf extra is not installed")
    code = (
        "from qquant.calibration.sources import read_source\n"
        "from qquant.errors import CalibrationError\n"
        "try:\n    read_source('hf:qquant-tests/no-such-data-set')\n"
        "except CalibrationError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "no-such-data-set" in done.stdout and "builtin" in done.stdout, done.stderr


# ---- the sets that ship, and those of the field


def test_builtin_is_what_it_says() -> None:
    data = read_source("builtin")
    assert data.format == "openai" and data.skipped == 0
    assert len(data.documents) >= 128
    from importlib import resources

    raw = resources.files("qquant.calibration").joinpath("builtin.jsonl").read_text("utf-8")
    records = [json.loads(line) for line in raw.splitlines()]
    languages = {r["lang"] for r in records}
    assert {"en", "zh", "ja", "es", "fr", "de", "ru", "ko", "ar", "pt"} <= languages
    topics = {r["topic"] for r in records}
    assert {"code", "math", "multi-turn", "tools", "structured"} <= topics
    assert sum(r["lang"] == "zh" for r in records) >= 20
    assert sum(r["topic"] == "code" for r in records) >= 20
    assert sum(r["topic"] == "math" for r in records) >= 12
    assert sum(sum(m["role"] == "user" for m in r["messages"]) > 1 for r in records) >= 12
    # written out, not generated: no answer occurs twice, nor does any long line of prose
    answers = [m["content"] for r in records for m in r["messages"] if m["role"] == "assistant"]
    assert len(set(answers)) == len(answers)
    prose = [line for a in answers for line in a.splitlines() if len(line) > 60]
    assert len(set(prose)) > 0.99 * len(prose)
    licence = resources.files("qquant.calibration").joinpath("BUILTIN_LICENSE.md")
    assert "CC0" in licence.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "layout", "documents"),
    [
        ("calibration/alpaca_en_demo.json", "alpaca", 999),
        ("calibration/alpaca_zh_demo.json", "alpaca", 1000),
        ("calibration/fastchat_dummy_conversation.json", "sharegpt", 500),
        ("calibration/mt_bench_question.jsonl", "prompts", 160),
        ("text/wikitext2-valid.txt", "text", None),
        ("text/cmrc2018_dev_paragraphs.txt.gz", "text", None),
    ],
)
def test_files_of_the_field(name: str, layout: str, documents: int | None) -> None:
    data = read_source(shared(name))
    assert data.format == layout
    assert documents in (None, len(data.documents) + data.skipped)
