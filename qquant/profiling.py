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

All figures that stand side by side were measured alike: results of other files, of another machine,
other versions or another reference are set `aside`, and so is a model of an earlier run that this
one does not name and would measure otherwise. Both come back when they hold again.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint
from .devices import choose_device, choose_dtype, driver_version, gpu_facts
from .errors import RunError, SpecError
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
from .profile_entries import compared, holds, keys, merge, places, split
from .profile_inputs import alone, earlier, wanted_models
from .profile_report import NAME, REPORT, render_markdown, write_reports
from .protocol import Protocol
from .reporting.glance import accuracy_measured
from .reporting.protocol import commands
from .reporting.schema import FORMAT, PAIRED
from .worker import Worker, failure

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
    wanted = wanted_models(models, against)
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
    found = earlier(folder / NAME)
    run = _Profile(folder, found, wanted, parts, device, dtype, progress)
    run.keep_states = keep_states
    run.reference = wanted[0] if against else None
    packages = dict.fromkeys(name for model in wanted for name in model.packages)
    packages |= dict.fromkeys(name for part in parts for name in part.packages())
    before = (found.get("machine") or {}).get("versions") or {}
    found |= {"format": FORMAT, "protocol": _plain(protocol.public()), "machine": _machine(device)}
    found["machine"]["versions"] = {**before, **versions(*packages)}
    # Of earlier runs, too: what they measured of other kinds is still there.
    found["seeds"] = dict(found.get("seeds") or {})
    for part in parts:
        found["seeds"] |= part.seeds()
    if command is not None:
        found["commands"] = list(dict.fromkeys([*commands(found), command]))
    if run.reference:
        found["reference"] = run.reference.name
    return run()


class _Profile:
    """One profile; `__call__` is the story."""

    reference: Model | None = None
    against: str | None = None  # the reference's files, as they were at first
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
        self.against = hashed(self.reference.identity()) if self.reference else None
        self._set_aside()
        left = {model: self._left(model) for model in self.models}
        self._check(left)
        states = self.folder / STATES
        with alone(states):
            self._tell_plan(left)
            self._tell_what_is_compared()
            self._make_room(left)
            self._settle_reference()
            for model in self.models:
                self._measure(model, left[model], self._to_keep(model, left), states)
            self._save()
            write_reports(self.folder, self._whole())
            self._tidy(states)
        return dict(json.loads((self.folder / NAME).read_text(encoding="utf-8")))

    def _set_aside(self) -> None:
        """What was measured of other files, elsewhere or against another reference does not stand
        beside what this run measures. It waits, and comes back when it holds again; so do models
        that this run does not name and measures otherwise."""
        models, aside = self.found["models"], dict(self.found.get("aside") or {})
        named = {model.name: model for model in self.models}
        for name, model in named.items():
            good = partial(holds, now=self._now(model))
            (kept, rest), (again, more) = (split(e.get(name) or {}, good) for e in (models, aside))
            models[name], aside[name] = merge(kept, again), merge(merge(rest, more), again)
            if told := ", ".join(places(rest)):
                self._warn(f"{name}: other files or otherwise measured, so set aside: {told}")
        for name in sorted(set(models) - set(named)):
            parts = [p for p in self.parts if p.applies(Model(name), self.reference)]
            results = [(part, part.stored(models[name]) or {}) for part in parts]
            other = [
                p.label for p, r in results if r.get("under", self._under(p)) != self._under(p)
            ]
            other += places(split(models[name], partial(holds, now=self._now()))[1])
            if other:
                aside[name] = merge(models.pop(name), aside.get(name) or {})
                text = f"{name} was measured otherwise ({', '.join(dict.fromkeys(other))}) and is"
                self._warn(f"{text} set aside: name it, too, to have it beside the others")
        self.found["aside"] = aside
        for model in self.models:
            self._bring_back(model)

    def _bring_back(self, model: Model) -> None:
        """Results that wait and are just what this run would measure; none is in both places."""
        entry, waiting = (self.found[place][model.name] for place in ("models", "aside"))
        for part in self._parts(model):
            key, mine, theirs = self._key(model, part), part.stored(entry), part.stored(waiting)
            if theirs and theirs.get("key") == key and (mine or {}).get("key") != key:
                part.drop(waiting)
                if mine:
                    part.store(waiting, mine)
                part.store(entry, theirs)
            if (stored := part.stored(entry)) and stored.get("key") == key:
                part.store(entry, stored | self._about(model, part))  # for one that lacks it
        there = set(keys(entry))
        self.found["aside"][model.name] = split(waiting, lambda r: r["key"] not in there)[0]

    def _settle_reference(self) -> None:
        """Without one given, an earlier one stays while what was compared with it does, unless
        this run measures without."""
        models, reference = self.found["models"], self.found.get("reference")
        others = [entry for name, entry in models.items() if name != reference]
        gone = reference not in models or not any(map(compared, others))
        if self.reference is None and (gone or self._measures_alone()):
            self.found.pop("reference", None)

    def _about(self, model: Model, part: Part) -> dict[str, Any]:
        """What stands beside a result."""
        about = {"key": self._key(model, part), "under": self._under(part)} | self._now(model)
        if not part.compared or not self.reference:
            about.pop("against", None)
        return about

    def _now(self, model: Model | None = None) -> dict[str, str]:
        """What results have to be measured of, as hashes: see `profile_entries`."""
        now = {"on": hashed([*self._machine(), versions()])}
        if self.reference:
            now["against"] = hashed(self.reference.identity())
        elif self._measures_alone():
            now["against"] = ""
        return now if model is None else now | {"of": hashed(model.identity())}

    def _measures_alone(self) -> bool:
        """Whether this run has no reference and measures what is compared where there is one."""
        alone = Model("")
        return not self.reference and any(p.compared and p.applies(alone, None) for p in self.parts)

    def _warn(self, text: str) -> None:
        self.progress(Warned(text))

    def _make_room(self, left: dict[Model, list[Part]]) -> None:
        """Results that are to be measured again wait aside: if that fails, they are not shown for
        what the protocol says."""
        for model, parts in left.items():
            entry = self.found["models"].get(model.name) or {}
            for part in parts:
                if (stored := part.stored(entry)) is not None:
                    part.store(self.found["aside"][model.name], stored)
                    part.drop(entry)

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
            about = self._about(model, part)
            if part.compared and about.get("against") != self.against:
                changed = f"files of {self.reference.name}" if self.reference else "reference"
                raise RunError(changed, expected="as they were", got="others by now")
            result = worker.measure(part, advance) if worker else part.measure(subject)
            if self._now(model)["of"] != about["of"]:
                raise RunError(model.name, expected="the files as they were", got="others by now")
            json.dumps(result, allow_nan=False)  # what cannot be written is that part's failure
            seconds = time.monotonic() - start
            entry = self.found["models"].setdefault(model.name, {})
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
        base = [*self._machine(), versions(*part.packages()), part.place, part.depends()]
        base.append(dict(part.seeds()))
        if part.compared and self.reference:
            base.append(self.reference.identity())
        return hashed(base)

    def _machine(self) -> list[Any]:
        return [str(self.dtype), torch.get_num_threads(), _device(self.device)]

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
            self._warn(f"{text}: {cure}")

    def _tell_plan(self, left: dict[Model, list[Part]]) -> None:
        known = []
        for model in self.models:
            entry = self.found["models"].get(model.name, {})
            for part in self._parts(model):
                if part not in left[model]:
                    result = part.stored(entry) or {}
                    text = _headline(part, result)
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
                if ours is None:
                    continue
                found = {key: value for key, value in ours.items() if key not in PAIRED}
                if reference is not None and model != self.reference:
                    found |= part.pair(found, reference)
                part.store(entry, found)

    def _save(self) -> None:
        self._pair()
        for name, entry in self.found["models"].items():
            if entry.get("load"):
                entry["load"]["reference"] = name == self.found.get("reference")
        self.found.pop("failed", None)
        if self.failed:
            self.found["failed"] = self.failed
        whole = self._whole()
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
        self._replace(NAME, text + "\n")
        self._replace(REPORT, render_markdown(whole))

    def _whole(self) -> dict[str, Any]:
        """The profile without entries that nothing stands in."""
        found = dict(self.found)
        for place in ("models", "aside"):
            found[place] = {name: e for name, e in found[place].items() if any(places(e))}
        return found if found["aside"] else {k: v for k, v in found.items() if k != "aside"}

    def _replace(self, name: str, content: str) -> None:
        fresh = self.folder / f".{name}.new"
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, self.folder / name)


def _headline(part: Part, result: dict[str, Any]) -> str:
    """Of a result from a file, in which something may be missing."""
    try:
        return part.headline(result)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return "done"


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
