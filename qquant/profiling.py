"""One protocol over several models: what each lost against the original, how fast, how large.

The run, and nothing of what is measured: that is `parts`, one kind each, listed by `protocol`;
`parts.base` tells how to add one. Models are measured one after another, each loaded, measured and
dropped, so that one fits where two do not. The reference comes first and leaves what candidates are
compared with (its hidden states, in a file); what wants a process of its own runs in one before the
model is loaded here.

Every finished measurement is written to `profile.json` at once and not made again: an interrupted
profile goes on after the last one, and a model or a kind can be added to an old profile. What is
measured with is part of each entry's key (files by size and time of change, texts by hash,
settings, seeds, device, dtype, threads, versions, and the reference where it takes part), so that
an entry is used again only where nothing has changed. One that fails is told, written down under
`failed` and left out; the others go on, and the same command tries it again.

All models that stand side by side were measured alike: a model of an earlier run that this one does
not name, and would measure otherwise, is set `aside` with what is known of it, and comes back when
it is named again.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .devices import choose_device, choose_dtype, driver_version, gpu_facts
from .errors import InputError, RunError, SpecError, TargetError
from .events import (
    Measured,
    MeasureFailed,
    Measuring,
    ProfilePlanned,
    Progress,
    Stage,
    Warned,
)
from .manifest import device_name, versions
from .parts.base import Advance, Model, Part, Subject, hashed, put
from .profile_report import NAME, REPORT, render_markdown, write_reports
from .protocol import Protocol
from .reporting.glance import accuracy_measured
from .worker import Worker, failure

FORMAT = 2
STATES = ".states"  # in the profile's directory: what was kept of the reference
logger = logging.getLogger(__name__)


def profile_models(
    models: Sequence[str],
    out: str | os.PathLike[str],
    *,
    against: str | None = None,
    protocol: Protocol | None = None,
    device: str = "auto",
    dtype: str | None = None,
    keep_states: bool = False,
    progress: Progress = lambda _: None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures every model and writes `profile.json` and its reports into the directory `out`.

    Args:
        models: directories, quantized or not; `nf4:DIR`, `fp4:DIR` and `int8:DIR` are quantized
            by bitsandbytes while they are loaded.
        out: made if it is not there; an earlier profile in it is gone on with.
        against: the reference, measured first; without it nothing is compared.
        protocol: what is measured. device, dtype: as in `load`.
        keep_states: leave the reference's states in `out`, so that a model that is added later
            needs the reference no more; they are vocabulary times hidden size, and hidden size
            times tokens, of the model's dtype. A run that ends early leaves them in any case.
        progress: handed `events.Stage("plan")`, `events.ProfilePlanned` and what follows it.
        command: the line that asks for this, to be kept beside earlier ones.

    Returns:
        What `profile.json` holds. Measurements that failed are listed under `failed`, as
        `{"model", "part", "error"}`; there is no such key where none did.

    Raises:
        InputError: a model, a text or a setting cannot be used, alone or with the others; `out`
            cannot be written, or has a `profile.json` that is damaged or of another version.
            Nothing was measured or written.
        RunError: another run is writing to `out`.
    """
    progress(Stage("plan"))
    protocol = protocol or Protocol()
    wanted = _wanted(models, against)
    for model in wanted:  # all of them before hours go into the first
        Checkpoint.open(model.path)
        if Path(out).resolve() == Path(model.path).resolve():
            raise SpecError(
                f"output {out}",
                expected="a directory of its own",
                got="that of a model, which has to stay as it is",
                cure="Give another one with -o",
            )
    parts = protocol.parts()
    choose_dtype(dtype, choose_device(device), None)
    folder = Path(out)
    found = _earlier(folder / NAME)
    run = _Profile(folder, found, wanted, parts, device, dtype, progress)
    run.keep_states = keep_states
    run.reference = wanted[0] if against else None
    packages = dict.fromkeys(name for model in wanted for name in model.packages)
    packages |= dict.fromkeys(name for part in parts for name in part.packages())
    earlier = (found.get("machine") or {}).get("versions") or {}
    found |= {"format": FORMAT, "protocol": _plain(protocol.public()), "machine": _machine(device)}
    found["machine"]["versions"] = {**earlier, **versions(*packages)}
    # Of earlier runs, too: what they measured of other kinds is still there.
    found["seeds"] = dict(found.get("seeds") or {})
    for part in parts:
        found["seeds"] |= part.seeds()
    if command is not None:
        found["commands"] = list(dict.fromkeys([*found.get("commands", []), command]))
    found.pop("reference", None)
    if run.reference:
        found["reference"] = run.reference.name
    return run()


class _Profile:
    """One profile; `__call__` is the story."""

    reference: Model | None = None
    keep_states = False

    def __init__(
        self,
        folder: Path,
        found: dict[str, Any],
        models: Sequence[Model],
        parts: Sequence[Part],
        device: str,
        dtype: str | None,
        progress: Progress,
    ) -> None:
        self.folder, self.found, self.models, self.parts = folder, found, models, parts
        self.device, self.dtype, self.progress = device, dtype, progress
        self.failed: list[dict[str, str]] = []
        self.kept: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        self._set_aside()
        left = {model: self._left(model) for model in self.models}
        self._check(left)
        states = self.folder / STATES
        with _alone(states):
            self._tell_plan(left)
            self._tell_what_is_compared()
            for model in self.models:
                self._measure(model, left[model], self._to_keep(model, left), states)
            self._save()
            write_reports(self.folder, self.found)
            self._tidy(states)
        return dict(json.loads((self.folder / NAME).read_text(encoding="utf-8")))

    def _set_aside(self) -> None:
        """Models that this run does not name and measures otherwise leave those that it names."""
        models, aside = self.found["models"], self.found.setdefault("aside", {})
        names = {model.name for model in self.models}
        for name in names & set(aside):
            models.setdefault(name, aside.pop(name))
        for name in sorted(set(models) - names):
            results = [(part, part.stored(models[name]) or {}) for part in self.parts]
            other = [
                p.label for p, r in results if r.get("under", self._under(p)) != self._under(p)
            ]
            if other:
                aside[name] = models.pop(name)
                text = f"{name} was measured otherwise ({', '.join(other)}) and is set aside"
                self.progress(Warned(f"{text}: name it, too, to have it beside the others"))
        if not aside:
            del self.found["aside"]

    def _tidy(self, states: Path) -> None:
        """Nothing that no later run can use stays."""
        if not self.keep_states and not self.failed:
            shutil.rmtree(states)
            return
        wanted = {self._states_name(part) for part in self.parts if self.reference}
        for file in states.iterdir():
            if file.name != "lock" and file.stem not in wanted:
                file.unlink()

    def _states_name(self, part: Part) -> str:
        assert self.reference is not None
        return f"{part.label.replace(' ', '-')}-{self._key(self.reference, part)}"

    def _left(self, model: Model) -> list[Part]:
        """What is still to be measured of this model."""
        entry = self.found["models"].get(model.name, {})
        return [
            part
            for part in self._parts(model)
            if (part.stored(entry) or {}).get("key") != self._key(model, part)
        ]

    def _parts(self, model: Model) -> list[Part]:
        return [part for part in self.parts if part.applies(model, self.reference)]

    def _to_keep(self, model: Model, left: dict[Model, list[Part]]) -> list[Part]:
        """Where this is the reference: what others are still to be compared by."""
        if model != self.reference:
            return []
        return [
            part
            for part in self.parts
            if part.compared and any(part in parts for parts in left.values())
        ]

    def _subject(self, model: Model) -> Subject:
        return Subject(model, self.reference, self.device, self.dtype, self.kept)

    def _check(self, left: dict[Model, list[Part]]) -> None:
        """Refuses, before hours are spent, what cannot be measured."""
        subjects = {model: self._subject(model) for model in self.models}
        for part in self.parts:
            asked = [model for model, parts in left.items() if part in parts]
            if asked and part.compared and self.reference:
                asked = list(dict.fromkeys([self.reference, *asked]))
            if asked:
                part.check([subjects[model] for model in asked])

    def _measure(self, model: Model, left: list[Part], keep: list[Part], spill: Path) -> None:
        subject = self._subject(model)
        for name in dict.fromkeys(part.process for part in left if part.process):
            with Worker(subject, torch.get_num_threads()) as worker:
                for part in left:
                    if part.process == name:
                        self._one(subject, part, worker)
        for part in keep:
            with self._caught(model, part):
                self._advancing(subject, part)
                self.kept[part.label] = part.keep(subject, spill, self._states_name(part))
        for part in left:
            told = part in keep and part.label not in self.kept  # that it failed
            if not part.process and not told:
                self._one(subject, part, None)
        subject.drop()

    def _one(self, subject: Subject, part: Part, worker: Worker | None) -> None:
        """One measurement, saved."""
        model = subject.model
        advance = self._advancing(subject, part)
        start = time.monotonic()
        with self._caught(model, part):
            result = worker.measure(part, advance) if worker else part.measure(subject)
            json.dumps(result, allow_nan=False)  # what cannot be written is that part's failure
            seconds = time.monotonic() - start
            entry = self.found["models"].setdefault(model.name, {})
            about = {"key": self._key(model, part), "under": self._under(part)}
            part.store(entry, {**about, "seconds": round(seconds, 3), **result})
            self._save()
            self.progress(Measured(model.name, part.label, part.headline(result), seconds))

    def _advancing(self, subject: Subject, part: Part) -> Advance:
        """Tells that the part begins, and from then on how far it is."""

        def advance(done: int, total: int) -> None:
            self.progress(Measuring(subject.model.name, part.label, done, total))

        self.progress(Measuring(subject.model.name, part.label))
        subject.advance = advance
        return advance

    @contextmanager
    def _caught(self, model: Model, part: Part) -> Iterator[None]:
        """One measurement that fails takes no other with it."""
        try:
            yield
        except Exception as error:
            logger.debug("%s: %s failed", model.name, part.label, exc_info=True)
            text = failure(error)
            self.failed.append({"model": model.name, "part": part.label, "error": text})
            self._save()
            self.progress(MeasureFailed(model.name, part.label, text))

    def _key(self, model: Model, part: Part) -> str:
        """What the measurement depends on, as a hash."""
        return hashed([model.identity(), self._under(part)])

    def _under(self, part: Part) -> str:
        """All of that but the model: figures that share it may be compared."""
        base: list[Any] = [self.device, str(self.dtype), torch.get_num_threads()]
        base += [_device(self.device), versions(*part.packages()), part.place, part.depends()]
        base.append(dict(part.seeds()))
        if part.compared and self.reference:
            base.append(self.reference.identity())
        return hashed(base)

    def _tell_what_is_compared(self) -> None:
        """That it is little, where it is."""
        wanted: dict[str, Any] = {}
        for part in self.parts:
            put(wanted, part.place, {"wanted": True})
        if self.reference and not accuracy_measured([wanted, *self.found["models"].values()]):
            text = (
                f"{self.reference.name} is compared by its weights alone, beside speed and memory"
            )
            cure = "give --text, --chat, --task or --long-context to measure what was lost"
            self.progress(Warned(f"{text}: {cure}"))

    def _tell_plan(self, left: dict[Model, list[Part]]) -> None:
        known = []
        for model in self.models:
            entry = self.found["models"].get(model.name, {})
            for part in self._parts(model):
                if part not in left[model]:
                    result = part.stored(entry) or {}
                    text = part.headline(result)
                    known.append((model.name, part.label, text, result.get("seconds") or 0.0))
        self.progress(
            ProfilePlanned(
                tuple(model.name for model in self.models),
                tuple(part.label for part in self.parts),
                tuple((model.name, part.label) for model in left for part in left[model]),
                tuple(known),
            )
        )

    def _pair(self) -> None:
        """What follows from a result and the reference's."""
        if self.reference is None:
            return
        theirs = self.found["models"].get(self.reference.name, {})
        for model in self.models:
            entry = self.found["models"].get(model.name, {})
            for part in self.parts:
                ours, reference = part.stored(entry), part.stored(theirs)
                if ours is not None and reference is not None:
                    paired = part.pair(ours, reference)
                    if model == self.reference:  # it may have been a candidate in an earlier run
                        ours, paired = {k: v for k, v in ours.items() if k not in paired}, {}
                    part.store(entry, ours | paired)

    def _save(self) -> None:
        self._pair()
        for name, entry in self.found["models"].items():
            if "load" in entry:
                entry["load"]["reference"] = name == self.found.get("reference")
        self.found.pop("failed", None)
        if self.failed:
            self.found["failed"] = self.failed
        text = json.dumps(self.found, indent=1, ensure_ascii=False, allow_nan=False)
        self._replace(NAME, text + "\n")
        self._replace(REPORT, render_markdown(self.found))

    def _replace(self, name: str, content: str) -> None:
        fresh = self.folder / f".{name}.new"
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, self.folder / name)


def _wanted(models: Sequence[str], against: str | None) -> list[Model]:
    """The models, the reference first, each once however its path is spelled.

    Raises:
        SpecError: there is none, or none to compare; two have one name.
    """
    given = [Model.parse(text) for text in ([against] if against else []) + list(models)]
    places: dict[tuple[Path, str | None], Model] = {}
    for model in given:
        places.setdefault((Path(model.path).resolve(), model.method), model)
    wanted = list(places.values())
    if not wanted:
        raise SpecError("models", expected="at least one", got="none")
    if against and len(wanted) == 1:
        raise SpecError(
            "models",
            expected="one beside the reference to compare with it",
            got=f"{against} alone",
            cure="Leave --against out to measure it by itself",
        )
    named: dict[str, Model] = {}
    for model in wanted:
        if (other := named.setdefault(model.name, model)) != model:
            raise SpecError(
                "models",
                expected="directories of different names",
                got=f"{other.path} and {model.path}",
                cure="Rename one: in the report they could not be told apart",
            )
    return wanted


@contextmanager
def _alone(states: Path) -> Iterator[None]:
    """Makes the folder, and holds it against other runs.

    Raises:
        TargetError: it cannot be made.
        RunError: another run has it.
    """
    try:
        states.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            str(states.parent),
            expected="a directory that can be written",
            got=error.strerror,
            cure="Give another one with -o",
        ) from error
    with (states / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                str(states.parent),
                expected="one profile at a time",
                got="another one that is running",
                cure="Wait for it, or give another directory with -o",
            ) from error
        yield


def _earlier(path: Path) -> dict[str, Any]:
    """The profile that is gone on with; an empty one where there is none."""
    if not path.exists():
        return {"models": {}}
    got: object = "something else"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        got = f"format {found['format']!r}"
        objects = [found.get("seeds") or {}, found.get("machine") or {}, *found["models"].values()]
        objects.append((found.get("machine") or {}).get("versions") or {})
        if found["format"] == FORMAT and all(isinstance(e, dict) for e in objects):
            return dict(found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise InputError(
        str(path),
        expected=f"a profile of format {FORMAT}, as this version writes",
        got=got,
        cure="Give another directory with -o, or remove the file and measure again",
    )


def _plain(value: Any) -> Any:
    """As it comes back from the file: reports made now and later are the same."""
    return json.loads(json.dumps(value))


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "versions": {},
        "gpu": gpu_facts(device),
        "driver": driver_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _device(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return device_name("cuda" if device == "auto" else device)
    return f"{device_name('cpu')} {torch.backends.cpu.get_cpu_capability()}"
