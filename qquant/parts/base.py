"""What a measurement is, to the run that makes it (`profiling`): the contract of all kinds.

A `Part` is one finished-or-absent measurement of one model: a domain of text, a benchmark, a speed
setting. It is a frozen dataclass of everything that it measures with, so that its key, the record
of the protocol and the trip into another process come for free. It says where its result stands in
the model's entry of `profile.json` (`place`), whether it wants a process of its own (`process`),
whether the reference takes part (`compared`), and how to measure.

How to add a kind: a module in this package with its parts and a frozen dataclass of its options
(`Options`), whose `parts()` lists what is to be measured; one field for it in `protocol.Protocol`;
and its command-line options, named like the option's fields, in `profile_cli`. The run, resuming,
progress and saving need no change.

Nothing here measures or imports torch at run time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..bnb_layout import is_bnb
from ..bnb_spec import METHODS
from ..checkpoint import Checkpoint
from ..directory import find_directory, read_json
from ..errors import CheckpointError, InputError
from ..manifest import package_version

if TYPE_CHECKING:
    from ..runtime import Loaded

Advance = Callable[[int, int], None]
# Of a directory's files, what a model or its tokenizer may be read from; not what only tells of it.
_READ = (".safetensors", ".json", ".py", ".tiktoken", ".jinja", ".model")
_ABOUT, _READ_TOO = ("qquant_manifest.json",), ("merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Model:
    """A directory, and how it is quantized while it is loaded, if it is: `nf4:DIR`."""

    path: str
    method: str | None = None

    @classmethod
    def parse(cls, given: str) -> Model:
        method, colon, path = given.partition(":")
        if colon and method in METHODS:
            return cls(path, method)
        return cls(given)

    @property
    def name(self) -> str:
        base = Path(self.path).resolve().name
        return f"{base} ({self.method} on the fly)" if self.method else base

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages whose arithmetic it is run by, beside those that every model is."""
        return ("bitsandbytes",) if self.method or is_bnb(self._quantization) else ()

    @property
    def _quantization(self) -> Any:
        return read_json(find_directory(self.path), "config.json").get("quantization_config")

    def identity(self) -> list[Any]:
        """What tells that the directory has not changed: files that a model or a tokenizer is read
        from, by size and time of change; and versions of `packages`, or of those whose kernels
        `load` may choose.

        Raises:
            CheckpointError: it cannot be read.
        """
        packages = self.packages or (("gptqmodel", "triton") if self._quantization else ())
        found: list[Any] = [self.method, {name: package_version(name) for name in packages}]
        try:
            for file in sorted(find_directory(self.path).iterdir()):
                read = file.suffix in _READ or file.name in _READ_TOO
                if read and file.name not in _ABOUT and file.is_file():
                    found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
        except OSError as error:
            raise CheckpointError(f"checkpoint {self.path}", got=error.strerror) from error
        return found


@dataclass
class Subject:
    """The model that is being measured, as a part gets it.

    Attributes:
        model: which one. reference: what it is compared with; None without `--against`.
        device, dtype: as in `runtime.load`.
        kept: what the reference's `Part.keep` gave, by the part's `label`.
        advance: told `(done, total)` of whatever the part counts, for the time left.
        compiled: whether it is going to decode compiled, for which kernels are chosen otherwise.
    """

    model: Model
    reference: Model | None = None
    device: str = "auto"
    dtype: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    advance: Advance = lambda done, total: None
    compiled: bool = False
    _loaded: Loaded | None = None
    _tokenizer: Any = None

    @property
    def is_reference(self) -> bool:
        return self.model == self.reference

    @property
    def loaded(self) -> Loaded:
        """The model, its tokenizer and kernel report; loaded when first asked for, then kept.

        Raises:
            as `runtime.load`.
        """
        if self._loaded is None:
            from ..runtime import load

            self._loaded = load(
                self.model.path,
                device=self.device,
                dtype=self.dtype,
                method=self.model.method,
                # bitsandbytes has but one kernel, and `load` compiles none of its models.
                compile=self.compiled and not self.model.packages,
            )
        return self._loaded

    @property
    def tokenizer(self) -> Any:
        """The model's, without loading the model.

        Raises:
            InputError: it has none, or its files are broken.
        """
        if self._tokenizer is None:
            from ..runtime import tokenizer_of

            loaded = self._loaded
            self._tokenizer = (
                loaded.tokenizer if loaded else tokenizer_of(Checkpoint.open(self.model.path))
            )
        if self._tokenizer is None:
            raise InputError(
                f"tokenizer of {self.model.name}",
                expected="its files in the directory",
                got="none",
                cure="Copy those of the model it was made from into it",
            )
        return self._tokenizer

    def drop(self) -> None:
        """Gives the model's memory back."""
        import gc

        import torch

        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Part:
    """One measurement of one model. Subclasses are frozen dataclasses, and can be pickled."""

    @property
    def place(self) -> tuple[str, ...]:
        """Keys under `models[NAME]` where the result stands, such as `("speed", "qwen-1-2048")`."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """For people: in the table, the log and messages; one of its own for each part."""
        return " ".join(self.place)

    @property
    def process(self) -> str | None:
        """None: measured in the run's process, on the model that is loaded there. A name: in a
        fresh process, shared by the model's parts of the same name one after another; nothing that
        was kept of the reference is there."""
        return None

    @property
    def compared(self) -> bool:
        """Whether the result depends on the reference, too."""
        return False

    def depends(self) -> object:
        """What the result depends on beside model, device, dtype, threads and versions; JSON.
        A path is no such thing: put the hash of the contents here."""
        return asdict(cast(Any, self))

    def seeds(self) -> Mapping[str, int]:
        """Every seed that the measurement draws with, by what is drawn, as `profile.json` has it;
        a name means one thing over all kinds. From the constants that are drawn with."""
        return {}

    def packages(self) -> tuple[str, ...]:
        """Packages that the result depends on, beside those of every measurement."""
        return ()

    def applies(self, model: Model, reference: Model | None) -> bool:
        """Whether this model has this measurement at all."""
        return True

    def check(self, subjects: Sequence[Subject]) -> None:
        """What can be known of the models before any of them is loaded.

        Args:
            subjects: those that this part is to measure; the reference before them, if it takes
                part.

        Raises:
            InputError: one cannot be measured so. The run ends, and has not begun.
        """

    def stored(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result as it stands in a model's entry, with its `key`; None where there is none."""
        return at(entry, self.place)

    def store(self, entry: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the result, which has its `key` and the `seconds` it took, into the entry."""
        put(entry, self.place, result)

    def drop(self, entry: dict[str, Any]) -> None:
        """Takes the result out of the entry."""
        remove(entry, self.place)

    def keep(self, subject: Subject, folder: Path, name: str) -> Any:
        """Called on the reference before any model is measured by this part, if `compared`; what
        it gives comes back as `subject.kept[self.label]`.

        Args:
            folder: for files whose names begin with `name`; they may be there from an earlier run
                with the same reference and the same settings.
        """
        return None

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The result as JSON (no NaN: None where a figure is unknown); without `key`."""
        raise NotImplementedError

    def pair(self, found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
        """What follows from this result and the reference's of the same part, such as a paired
        difference; put into the result whenever both are there. Computed, never measured."""
        return {}

    def headline(self, found: Mapping[str, Any]) -> str:
        """The result in a few words for the table that is shown while the profile runs."""
        return "done"


class Options:
    """The options of one kind. Subclasses are frozen dataclasses; a field name means one thing over
    all kinds, since command-line options are given by name to every kind that has it."""

    def parts(self) -> tuple[Part, ...]:
        """What is to be measured; cheap but for reading small files.

        Raises:
            InputError: an option names something that cannot be used.
        """
        raise NotImplementedError

    def public(self) -> dict[str, Any]:
        """The options as `profile.json` has them: without folders of this machine."""
        return asdict(cast(Any, self))


def option(field: str) -> str:
    """The option that a field of that name is given by."""
    return "--" + field.replace("_", "-")


def hashed(value: object) -> str:
    """A short hash of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def at(entry: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any] | None:
    """What stands at `place` in a model's entry; None where nothing does."""
    found: Any = entry
    for step in place:
        if not isinstance(found, dict) or step not in found:
            return None
        found = found[step]
    return found if isinstance(found, dict) else None


def remove(entry: dict[str, Any], place: tuple[str, ...]) -> None:
    """Takes out what stands at `place`, and what is empty then."""
    first, *rest = place
    inner = entry.get(first)
    if rest and isinstance(inner, dict):
        remove(inner, tuple(rest))
    if not rest or not inner:
        entry.pop(first, None)


def put(entry: dict[str, Any], place: tuple[str, ...], value: dict[str, Any]) -> None:
    """Puts `value` at `place`."""
    for step in place[:-1]:
        if entry.get(step) is None:
            entry[step] = {}
        entry = entry[step]
    entry[place[-1]] = value
