"""`qquant card`: what a profile measured, put into the model card of the directory it measured.

The card gets the tables and charts between two marker lines, the results in its front matter
(`card_results`), and a folder `profile/` beside it with the pictures and the raw numbers. All other
text is kept, whoever wrote it. A profile of other weights is refused. Hashes in `SHA256SUMS` and in
the manifest follow for exactly the files written here, so that `verify` is as content as before.

The directory is replaced as a whole (`publish.WorkDir`), its large files by hard links: killed at
any moment, it is the old one or the new one. The same profile gives the same bytes; where nothing
would change nothing is written.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_results import with_results, without
from .directory import find_directory, read_json, sha256_files
from .errors import CheckpointError, InputError
from .manifest import CARD, record_file
from .manifest import NAME as MANIFEST
from .profile_report import body
from .publish import WorkDir
from .reporting import png
from .reporting.charts import NAMES, charts
from .reporting.figures import is_reference, markdown_text, models_of
from .reporting.glance import glance, sentences
from .reporting.protocol import commands, protocol_rows, public
from .reporting.schema import NAME, known, of, read_profile
from .reporting.sections import sections
from .sums import NAME as SUMS
from .sums import renew_sums

BEGIN, END = "<!-- qquant profile: begin -->", "<!-- qquant profile: end -->"
FOLDER = "profile"
_BEFORE = "## How to make it again\n"  # of our own cards; others get the section at their end
_TOO_MUCH = ("position", "memory-full")  # in profile.json and the report
_ON_THE_FLY = "on the fly)"


@dataclass(frozen=True)
class Carded:
    """Attributes:
    path: the directory. model: its name in the profile. written: names of changed files.
    """

    path: Path
    model: str
    written: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.path), "model": self.model, "written": list(self.written)}


def write_profile_card(
    directory: str | os.PathLike[str],
    profile: str | os.PathLike[str],
    name: str | None = None,
) -> Carded:
    """Puts a profile into the card of the directory that it measured.

    Args:
        name: the model's name in the profile; without it the one with the directory's weights.

    Raises:
        InputError: the profile cannot be read or is of other weights, or the card is such that
            nothing can be put into it.
        CheckpointError: there is no such directory.
        TargetError: the directory cannot be replaced.
        MissingDependencyError: the extra `plots` is not installed.
    """
    root = find_directory(directory)
    found = read_profile(profile)
    model = identify(root, found, name)
    whole = only(found, model)
    shown = known(whole)
    try:
        card = (root / CARD).read_text(encoding="utf-8") if (root / CARD).exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{CARD} of {root}", expected="text", got=error) from error
    text = with_section(card or f"# {root.name}\n", section(shown))
    contents = {f"{FOLDER}/{c.name}.png": png.draw(c) for c in charts(shown)}
    contents[f"{FOLDER}/{NAME}"] = public(whole).encode()
    contents[CARD] = with_results(text, shown, model, root.name).encode()
    drawn = {f"{FOLDER}/{name}.png" for name in NAMES}  # of an earlier profile, too
    stale = {name for name in drawn - set(contents) if os.path.lexists(root / name)}
    changed = {n: c for n, c in contents.items() if _content(root / n) != c}
    if changed or stale:
        _replace(root, changed, stale, list(contents))
    return Carded(root, model, tuple(sorted([*changed, *stale])))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def identify(root: Path, found: Mapping[str, Any], name: str | None) -> str:
    """The name in the profile of the model whose weights are the directory's.

    Raises:
        InputError: there is none; the message names what differs.
    """
    others = [
        m for m in models_of(found) if not is_reference(found, m) and not m.endswith(_ON_THE_FLY)
    ]
    if name is not None and name not in found["models"]:
        raise InputError("--name", expected=f"one of {', '.join(found['models'])}", got=repr(name))
    weights = sorted(root.glob("*.safetensors"))
    sizes = sum(path.stat().st_size for path in weights)
    hashes: dict[str, str] = {}
    differing: list[tuple[str, str]] = []
    matching = []
    for model in [name] if name is not None else others:
        if of(found["models"][model], "load", "weights") and not hashes:
            hashes = {path.name: digest for path, digest in sha256_files(weights).items()}
        if difference := _difference(found["models"][model], hashes, sizes):
            differing.append((model, difference))
        else:
            matching.append(model)
    if root.name in matching:
        return root.name
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise InputError(
            f"profile of {root.name}",
            expected="one model with these weights",
            got=", ".join(matching),
            cure="Say which one with --name",
        )
    differing.sort(key=lambda pair: pair[0] != root.name)
    raise InputError(
        f"profile of {root.name}",
        expected="a model measured with the weights of this directory",
        got="; ".join(f"{model}: {text}" for model, text in differing) or "no quantized model",
        cure="Measure this directory: qquant profile",
    )


def _difference(entry: Mapping[str, Any], hashes: Mapping[str, str], sizes: int) -> str:
    """What tells the measured weights from the directory's; empty if they are the same."""
    measured = of(entry, "load", "weights")
    if measured:
        if missing := sorted(set(measured) ^ set(hashes)):
            return f"{missing[0]} is only in one of them"
        wrong = [n for n, digest in sorted(measured.items()) if hashes[n] != digest]
        return f"SHA-256 of {wrong[0]} is {measured[wrong[0]][:12]}..." if wrong else ""
    size = of(entry, "load", "file_bytes")
    if size is None:
        return "its files were not recorded"
    return "" if size == sizes else f"{size} bytes of weights, here {sizes}"


def only(found: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The profile of one model and the reference."""
    kept = {m: e for m, e in found["models"].items() if m == model or is_reference(found, m)}
    whole = {key: value for key, value in found.items() if key not in ("aside", "failed")}
    told = found.get("failed")
    told = [f for f in told if isinstance(f, dict)] if isinstance(told, list) else []
    if failed := [f for f in told if f.get("model") in kept]:
        whole["failed"] = failed
    return {**whole, "models": kept}


def section(found: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    return "\n".join([BEGIN, *_section(found), END]).replace("\n\n\n", "\n\n") + "\n"


def _section(found: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Measured", "")
    yield from (f"- {markdown_text(text)}" for text in sentences(found))
    yield from ("", glance(found).markdown(), "")
    pictures = [chart.name for chart in charts(found)]
    for chart, heading, tables in sections(found):
        kept = [t for t in tables if not t.id.startswith(_TOO_MUCH)]
        yield from (f"### {heading}", "", *body(chart, kept, pictures, "####", f"{FOLDER}/"))
    machine = found["machine"]
    parts = [machine.get("device"), machine.get("date")]
    parts += [f"{key} {value}" for key, value in (machine.get("versions") or {}).items()]
    told = ", ".join(markdown_text(str(part)) for part in parts if part)
    settings = "; ".join(f"{key} {value}" for key, value in protocol_rows(found))
    yield from (f"Measured by `qquant profile` on {told}.", f"Protocol: {markdown_text(settings)}.")
    if lines := commands(found):
        yield from ("", "```sh", *(line.replace("`", "'") for line in lines), "```", "")
    yield f"Raw numbers: [`{FOLDER}/{NAME}`]({FOLDER}/{NAME})."
    yield ""


def with_section(card: str, text: str) -> str:
    """The card with the section in place of an earlier one, else before how to make it again.

    Raises:
        InputError: there is one marker without the other.
    """
    marked = re.search(rf"^{re.escape(BEGIN)}\n(?:.*\n)*?{re.escape(END)}(?:\n|\Z)", card, re.M)
    if marked:
        rest = card[marked.end() :]
        without(rest, BEGIN, END)
        return card[: marked.start()] + text + rest
    without(card, BEGIN, END)  # refuses half a pair
    before, heading, after = card.partition(_BEFORE)
    if heading:
        return f"{before}{text}\n{heading}{after}"
    return f"{card.rstrip()}\n\n{text}" if card.strip() else text


def _replace(root: Path, changed: Mapping[str, bytes], stale: set[str], ours: list[str]) -> None:
    with WorkDir(root, overwrite=True) as work:
        link_tree(root, work.path)
        for name in stale:
            (work.path / name).unlink()
        for name, content in changed.items():
            path = work.path / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # a hard link: writing would change the old one, too
            path.write_bytes(content)
        _renew(work.path, ours, stale)
        work.publish()


def _renew(root: Path, ours: list[str], stale: set[str]) -> None:
    """The hashes of our files, in the manifest first, whose own hash is in SHA256SUMS."""
    names = list(ours)
    if os.path.lexists(root / MANIFEST):
        manifest = read_json(root, MANIFEST)
        manifest["files"] = {
            n: digest for n, digest in (manifest.get("files") or {}).items() if n not in stale
        }
        (root / MANIFEST).unlink()
        for name in ours:
            record_file(root, manifest, name)
        names.append(MANIFEST)
    if os.path.lexists(root / SUMS):
        renew_sums(root, names, stale)


def link_tree(source: Path, target: Path) -> None:
    """`target` like `source`, files as hard links where the file system has them, else copies."""
    for folder, folders, names in os.walk(source):
        inside = target / Path(folder).relative_to(source)
        for name in folders:
            if not (Path(folder) / name).is_symlink():
                (inside / name).mkdir()
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*names, *linked]:
            path = Path(folder) / name
            if path.is_symlink():
                os.symlink(os.readlink(path), inside / name)
                continue
            try:
                os.link(path, inside / name)
            except OSError:
                shutil.copy2(path, inside / name)
    shutil.copystat(source, target)
