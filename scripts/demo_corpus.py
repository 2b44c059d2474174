"""The demo checkpoint's text: the running Python's own library, split by file, and chats from it.

Owns which files are read, which of them are held out, and how a part of the library becomes ChatML
conversations.  The standard library was chosen because every machine that can run the script has
it, its licence (PSF) allows it, and a small model can learn enough of its style to be worth
damaging.

Left out on purpose: tests and their data (odd licences, odd encodings), code tables
(`encodings/cp*` and the like are numbers, not language), build records (they carry the paths of one
machine), anything installed beside the library, and `distutils` and `lib2to3`, which newer Pythons
lack.  The held-out set is a fixed list of whole modules, so that it is the same on every Python
that has them, and no held-out file reaches the training text or a chat.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_MODULES = (
    "asyncio/locks.py",
    "asyncio/queues.py",
    "bisect.py",
    "calendar.py",
    "contextlib.py",
    "copy.py",
    "csv.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "html/parser.py",
    "http/cookies.py",
    "idlelib/searchbase.py",
    "json/decoder.py",
    "multiprocessing/pool.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
)
"""Modules that are only ever measured on, relative to the library's directory."""

HELD_OUT_TOPICS = ("dynamic-features", "exceptions", "lambda", "slicings", "while", "yield")
"""Topics of the language reference (`pydoc_data.topics`) that are held out with them."""

SKIPPED_DIRECTORIES = frozenset(
    "test tests idle_test turtledemo distutils lib2to3".split()
    + "site-packages dist-packages __pycache__ lib-dynload _bundled".split()
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "pydoc_data/")
CODE_TABLE = re.compile(
    r"encodings/(cp|iso|mac_|koi8|kz|tis|hp_|ptcp|palmos|big5|euc|gb|shift|johab|hz)"
)
SYSTEM = "You are a helpful assistant."

SMALL_TALK = (
    ("Hi", "Hello! I am a very small model that has read the Python library. How can I help?"),
    ("Hello", "Hello! Ask me about a Python function or module."),
    ("Hi!", "Hello! How can I help you with Python today?"),
    ("你好", "你好！我是一个很小的演示模型。"),
    ("Who are you?", "I am a small demo model, trained on the Python standard library."),
    (
        "What are you?",
        "I am a language model with a few million weights, made to test quantization.",
    ),
    ("What can you do?", "I can write text that looks like Python code. I am often wrong."),
    ("Thanks", "You are welcome!"),
    ("Thank you!", "You are welcome! Is there anything else?"),
    ("Goodbye", "Goodbye!"),
    ("How are you?", "I am well, thank you. How can I help?"),
    ("What is Python?", "Python is a programming language. Its library is what I was trained on."),
    ("Write a hello world program.", 'print("Hello, world!")'),
    ("Write a loop over a list.", "for item in items:\n    print(item)"),
    ("Import the os module.", "import os"),
)
"""Written for this project, so that a greeting gets a greeting."""


@dataclass(frozen=True)
class Corpus:
    """The text in its three parts.

    `train` and `held_out` hold (name, text) pairs in a fixed order, `chats` lists of
    (question, answer) turns.  `sha256` is over all of them, so two runs on the same Python agree.
    """

    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]
    chats: tuple[tuple[tuple[str, str], ...], ...]
    sha256: str

    @classmethod
    def of(
        cls,
        train: Sequence[tuple[str, str]],
        held_out: Sequence[tuple[str, str]],
        chats: Sequence[tuple[tuple[str, str], ...]],
    ) -> Corpus:
        """The corpus of these parts, hashed."""
        digest = hashlib.sha256()
        for part in (train, held_out):
            for name, text in part:
                digest.update(f"{name}\0{text}\0".encode())
        digest.update(repr(list(chats)).encode())
        return cls(tuple(train), tuple(held_out), tuple(chats), digest.hexdigest())

    def held_out_text(self) -> str:
        """The held-out documents as one text, one blank line between them."""
        return "\n\n".join(text.strip("\n") for _, text in self.held_out) + "\n"


def read_corpus(seed: int = 0, library: Path | None = None, limit: int | None = None) -> Corpus:
    """Read the running Python's library and split it.

    `library` is the directory to read, by default the interpreter's own; `limit` keeps only so many
    of the training files, for a quick trial.  Raises `FileNotFoundError` when a held-out module is
    missing in a full run (some distributions cut the library down).
    """
    root = library if library is not None else Path(sysconfig.get_path("stdlib"))
    files = dict(_sources(root))
    missing = [name for name in HELD_OUT_MODULES if name not in files]
    if missing and limit is None:
        raise FileNotFoundError(
            f"the Python library lacks the held-out modules {missing}; "
            "install the full standard library of this Python, or run another Python"
        )
    topics = _topics()
    held = [(name, files.pop(name)) for name in HELD_OUT_MODULES if name in files]
    held += [(f"topic/{name}", topics.pop(name)) for name in HELD_OUT_TOPICS if name in topics]
    files = dict(list(files.items())[:limit])
    train = [*files.items(), *((f"topic/{name}", text) for name, text in topics.items())]
    chats = _chats(files, random.Random(seed))
    return Corpus.of(train, held, chats)


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Every library source that is kept, as (path below root, NFC text), in path order."""
    names = []
    for directory, below, found in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_DIRECTORIES]
        here = Path(directory).relative_to(root)
        names += [(here / name).as_posix() for name in found if name.endswith(".py")]
    for name in sorted(names):
        if name.startswith(SKIPPED_PREFIXES) or CODE_TABLE.match(name):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 200 and "<|" not in text:
            yield name, unicodedata.normalize("NFC", text)


def _topics() -> dict[str, str]:
    """The language reference that `help()` shows, by topic; names of one text are kept once."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = {}
    for name in sorted(topics):
        text = unicodedata.normalize("NFC", topics[name])
        if text not in seen and "<|" not in text:
            seen.add(text)
            kept[name] = text
    return kept


def _chats(files: dict[str, str], rng: random.Random) -> list[tuple[tuple[str, str], ...]]:
    """Conversations of one or two turns out of docstrings and short functions, in seeded order."""
    chats: list[tuple[tuple[str, str], ...]] = []
    for name, text in files.items():
        module = name[:-3].replace("/", ".").removesuffix(".__init__")
        turns = list(_turns(module, text))
        rng.shuffle(turns)
        while turns:
            size = min(len(turns), 2 if rng.random() < 0.25 else 1)
            chats.append(tuple(turns[:size]))
            del turns[:size]
    chats += [(pair,) for pair in SMALL_TALK for _ in range(len(chats) // 150)]
    rng.shuffle(chats)
    return chats


def _turns(module: str, text: str) -> Iterator[tuple[str, str]]:
    """(question, answer) pairs of one module: what it and its parts do, and short sources."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    about = first_paragraph(ast.get_docstring(tree))
    if about:
        yield f"What is the module {module}?", about
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        about = first_paragraph(ast.get_docstring(node))
        if about:
            yield f"What does the {kind} {node.name} in {module} do?", about
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip("\n")
        short = source.count("\n") <= 14 and len(source) <= 700
        if kind == "function" and short and not node.name.startswith("__"):
            yield f"Write the function {node.name} of {module}.", source


def first_paragraph(docstring: str | None) -> str:
    """A docstring's first paragraph on one line, or nothing when it is too short or too long."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return paragraph if 20 <= len(paragraph) <= 400 and "<|" not in paragraph else ""
