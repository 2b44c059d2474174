"""The second checkpoint's text: the docstrings of four packages that torch and qquant bring along.

English prose about numbers, graphs, algebra and tensors, with doctest examples: another language
than the demo's, which is Python source.  numpy, networkx, sympy and torch were chosen because every
machine that runs qquant has them and because together they say more than the training needs; the
docstrings of transformers are left out (thousands of near copies of each other).

One document is one file: each docstring under its dotted name, in the order of the source.  A
docstring that is word for word another's is kept once.  Which files are held out is decided by a
hash of their names, so that another version of a package holds out the same ones; held-out files
are read first, so that nothing in them is also trained on.  Tests and the packages' own copies of
other software are left out.  Nothing is imported: files are parsed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo_corpus import Corpus, first_paragraph

PACKAGES = ("networkx", "numpy", "sympy", "torch")
HELD_OUT_ONE_IN = 24
SKIPPED_DIRECTORIES = frozenset({"tests", "test", "testing", "_vendor", "_vendored_packages"})
SHORTEST = 60
"""Characters; shorter docstrings say little more than the name."""

Doc = tuple[str, str, str]
"""Kind (module, class, function), dotted name, text."""


def read_docs(
    seed: int = 0, roots: Sequence[Path] | None = None, limit: int | None = None
) -> Corpus:
    """Read and split the docstrings.

    `roots` are the packages' directories, by default those of the running Python; `limit` keeps
    only so many files, for a quick trial.  Raises `FileNotFoundError` when a package is missing.
    """
    files = [pair for root in roots or _installed() for pair in _sources(root)][:limit]
    chosen: tuple[list[str], list[str]] = ([], [])
    paths = dict(files)
    for name in paths:
        chosen[held_out(name)].append(name)
    seen: set[str] = set()
    held = [(name, list(_docs(name, paths[name], seen))) for name in chosen[True]]
    train = [(name, list(_docs(name, paths[name], seen))) for name in chosen[False]]
    chats = [turns for name, docs in train for turns in _chats(docs)]
    random.Random(seed).shuffle(chats)
    return Corpus.of(_documents(train), _documents(held), chats)


def held_out(name: str) -> bool:
    """Whether a file, by its path from the package's name on, is only ever measured on."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _installed() -> list[Path]:
    """The packages' directories, found without importing them."""
    roots = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"{package} is not installed; pip install {package}")
        roots.append(Path(spec.origin).parent)
    return roots


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(name such as `numpy/linalg/_linalg.py`, path) of every kept file, in name order."""
    found = sorted((path.relative_to(root.parent).as_posix(), path) for path in root.rglob("*.py"))
    for name, path in found:
        parts = name.split("/")
        if not SKIPPED_DIRECTORIES & set(parts) and not parts[-1].startswith("test_"):
            yield name, path


def _docs(name: str, path: Path, seen: set[str]) -> Iterator[Doc]:
    """The docstrings of one file that are in none before it; `seen` is added to."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    module = name[:-3].replace("/", ".").removesuffix(".__init__")
    for kind, dotted, text in _walk(tree, module):
        clean = unicodedata.normalize("NFC", text).strip()
        if len(clean) >= SHORTEST and "<|" not in clean and clean not in seen:
            seen.add(clean)
            yield kind, dotted, clean


def _walk(node: ast.AST, dotted: str) -> Iterator[Doc]:
    """Docstrings of a module, class or function and of what is defined in it, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        kinds = {ast.Module: "module", ast.ClassDef: "class"}
        if text := ast.get_docstring(node):
            yield kinds.get(type(node), "function"), dotted, text
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _walk(child, f"{dotted}.{name}" if named else dotted)


def _documents(files: list[tuple[str, list[Doc]]]) -> list[tuple[str, str]]:
    """(name, text) of every file that has docstrings."""
    return [
        (name, "\n\n\n".join(f"{dotted}\n\n{text}" for _, dotted, text in docs))
        for name, docs in files
        if docs
    ]


def _chats(docs: list[Doc]) -> Iterator[tuple[tuple[str, str], ...]]:
    """One question and answer about each thing whose docstring opens with a short paragraph."""
    for kind, dotted, text in docs:
        if about := first_paragraph(text):
            yield ((f"What is the {kind} {dotted}?", about),)
