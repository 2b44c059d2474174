"""One protocol over several models: what each lost against the original, how fast, how large.

Models are measured one after another, each loaded, measured and dropped, so that one fits where two
do not. The reference comes first and leaves its hidden states in a file (`profile.KeptReference`);
each candidate is then compared with it on the same ids. Speed and memory are measured in a process
of their own. Every finished measurement is written to `profile.json` at once and not made again: an
interrupted profile goes on, and a model can be added to an old one. What is measured with is part
of each entry's key (files by size and time of change, text by hash, settings, device, dtype,
threads, versions), so that an entry is used again only where nothing has changed.

Left out for now: task accuracy (MMLU, C-Eval and so on), long contexts, charts and the HTML page.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import profile
from .bnb_spec import METHODS
from .checkpoint import Checkpoint
from .devices import peak_memory, reset_peak_memory, resident_bytes
from .errors import CheckpointError, InputError, RunError, SpecError
from .manifest import device_name, versions
from .profile_report import NAME, REPORT, render_markdown
from .runtime import Loaded, load

Say = Callable[[str], None]
FORMAT = 1


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes:
        texts: files to measure accuracy on; each is a domain of its own.
        seqlen: tokens of a row.
        max_tokens: of each text, at the most.
        prompt_len, new_tokens: of the speed run, batch 1; no new tokens leaves speed out.
        repeats: of the speed run, after one to warm up.
    """

    texts: tuple[str, ...] = ()
    seqlen: int = 512
    max_tokens: int = 40960
    prompt_len: int = 512
    new_tokens: int = 128
    repeats: int = 3

    def __post_init__(self) -> None:
        for key, least in (
            ("seqlen", 2),
            ("max_tokens", 2),
            ("prompt_len", 1),
            ("new_tokens", 0),
            ("repeats", 1),
        ):
            if getattr(self, key) < least:
                raise SpecError(key, expected=f"at least {least}", got=getattr(self, key))
        if self.new_tokens == 1:
            raise SpecError("new_tokens", expected="0 or at least 2", got=1, cure="Use 128")


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


def profile_models(
    models: Sequence[str],
    out: str | os.PathLike[str],
    *,
    against: str | None = None,
    protocol: Protocol | None = None,
    device: str = "auto",
    dtype: str | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measures every model and writes `profile.json` and `REPORT.md` into the directory `out`.

    Args:
        models: directories, quantized or not; `nf4:DIR`, `fp4:DIR` and `int8:DIR` are quantized
            by bitsandbytes while they are loaded.
        out: made if it is not there; an earlier profile in it is gone on with.
        against: the reference, measured first; without it nothing is compared.
        protocol: what is measured. device, dtype: as in `load`. say: told what is going on.

    Returns:
        What `profile.json` holds.

    Raises:
        InputError: a model, a text or a setting cannot be used.
        RunError: the `profile.json` that is there is damaged.
    """
    protocol = protocol or Protocol()
    wanted = [Model.parse(given) for given in ([against] if against else []) + list(models)]
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise SpecError("models", expected="at least one", got="none")
    if len({m.name for m in wanted}) < len(wanted):
        raise SpecError("models", expected="directories of different names", got="equal ones")
    for model in wanted:  # all of them before hours go into the first
        Checkpoint.open(model.path)
    texts = {Path(t).name: _read(t) for t in protocol.texts}
    if against and not texts:
        raise SpecError(
            "--text",
            expected="at least one text to compare on",
            got="none",
            cure="Give --text FILE, or leave --against out",
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Profile(folder, wanted, bool(against), texts, protocol, device, dtype, say)
    return run()


class _Profile:
    """One profile; `__call__` is the story."""

    def __init__(
        self,
        folder: Path,
        models: Sequence[Model],
        compared: bool,
        texts: Mapping[str, str],
        protocol: Protocol,
        device: str,
        dtype: str | None,
        say: Say,
    ) -> None:
        self.folder, self.models, self.texts, self.protocol = folder, models, texts, protocol
        self.reference = models[0] if compared else None
        self.device, self.dtype, self.say = device, dtype, say
        self.kept: profile.KeptReference | None = None
        self.found = _earlier(folder / NAME)

    def __call__(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".states-") as spill:
            for model in self.models:
                keys = self._keys(model)
                if self._complete(model, keys):
                    self.say(f"{model.name}: measured before")
                else:
                    self._measure(model, keys, Path(spill))
        self._save()
        return dict(json.loads((self.folder / NAME).read_text(encoding="utf-8")))

    def _complete(self, model: Model, keys: Mapping[str, str]) -> bool:
        """Whether nothing is left to measure; the reference runs again for others' sake only."""
        entry = self.found["models"].get(model.name, {})
        if any(entry.get(part, {}).get("key") != key for part, key in keys.items()):
            return False
        return model != self.reference or all(
            self._complete(other, self._keys(other)) for other in self.models if other != model
        )

    def _measure(self, model: Model, keys: Mapping[str, str], spill: Path) -> None:
        entry = self.found["models"].setdefault(model.name, {})
        if "speed" in keys and entry.get("speed", {}).get("key") != keys["speed"]:
            self.say(f"{model.name}: speed and memory")
            found = _in_a_process_of_its_own(model, self.device, self.dtype, self.protocol)
            entry["speed"] = {"key": keys["speed"], **found}
            self._save()
        self.say(f"{model.name}: loading")
        loaded = load(model.path, device=self.device, dtype=self.dtype, method=model.method)
        entry["load"] = {
            "key": keys["load"],
            "kernel": str(loaded.kernel),
            "weight_bytes": loaded.kernel.weight_bytes,
            "file_bytes": sum(p.stat().st_size for p in Path(model.path).glob("*.safetensors")),
            "reference": model == self.reference,
        }
        ids = {name: self._ids(loaded, text) for name, text in self.texts.items()}
        if model == self.reference:
            self.say(f"{model.name}: reference states")
            self.kept = profile.KeptReference(loaded.model, list(ids.values()), spill)
        if ids and entry.get("accuracy", {}).get("key") != keys["accuracy"]:
            domains = {name: self._accuracy(loaded, name, rows) for name, rows in ids.items()}
            entry["accuracy"] = {"key": keys["accuracy"], "domains": domains}
        self._save()
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _ids(self, loaded: Loaded, text: str) -> Tensor:
        if loaded.tokenizer is None:
            raise InputError("tokenizer", expected="its files in the directory", got="none")
        return profile.heldout_ids(
            loaded.tokenizer, text, self.protocol.seqlen, self.protocol.max_tokens
        )

    def _accuracy(self, loaded: Loaded, name: str, ids: Tensor) -> dict[str, Any]:
        self.say(f"{ids.numel()} tokens of {name}")
        result: dict[str, Any] = {"tokens": ids.shape[0] * (ids.shape[1] - 1)}
        if self.kept is None:
            return result | {"perplexity": list(profile.perplexity(loaded.model, ids))}
        pair = profile.compare_all(self.kept, {"it": loaded.model}, ids)["it"]
        return result | {
            "perplexity": list(pair.ppl_candidate),
            "nll_lost": list(pair.nll_lost),
            "kl": list(pair.kl),
            "top1": list(pair.top1),
        }

    def _keys(self, model: Model) -> dict[str, str]:
        """What each measurement depends on, as a hash."""
        p = self.protocol
        base = [_identity(model), self.device, str(self.dtype), torch.get_num_threads()]
        base += [_machine(self.device), versions()]
        keys = {"load": _hash(base)}
        if self.texts:
            texts = {n: hashlib.sha256(t.encode()).hexdigest() for n, t in self.texts.items()}
            beside = _identity(self.reference) if self.reference else None
            keys["accuracy"] = _hash([base, texts, p.seqlen, p.max_tokens, beside])
        if p.new_tokens:
            keys["speed"] = _hash([base, p.prompt_len, p.new_tokens, p.repeats])
        return keys

    def _save(self) -> None:
        self.found |= {
            "format": FORMAT,
            "reference": self.reference.name if self.reference else None,
            "protocol": {**asdict(self.protocol), "texts": list(self.texts)},
            "machine": {
                "device": _machine(self.device),
                "threads": torch.get_num_threads(),
                "versions": versions(),
            },
        }
        text = json.dumps(self.found, indent=1, ensure_ascii=False)
        for name, content in ((NAME, text + "\n"), (REPORT, render_markdown(self.found))):
            fresh = self.folder / f".{name}.new"
            fresh.write_text(content, encoding="utf-8")
            os.replace(fresh, self.folder / name)


def _in_a_process_of_its_own(
    model: Model, device: str, dtype: str | None, protocol: Protocol
) -> dict[str, Any]:
    """`_speed_and_memory` in a fresh process, where nothing else has left its mark on the heap."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = (model, device, dtype, protocol, torch.get_num_threads())
        try:
            return pool.submit(_speed_and_memory, *arguments).result()
        except BrokenProcessPool as error:
            raise RunError(
                f"measuring {model.name}",
                expected="speed and memory",
                got="a process that was killed, as when memory runs out",
                cure="Use a shorter --prompt-len, or --new-tokens 0 to leave this out",
            ) from error


def _speed_and_memory(
    model: Model, device: str, dtype: str | None, p: Protocol, threads: int
) -> dict[str, Any]:
    """Speed, and the peak of memory from before loading: of the device, or of the process."""
    torch.set_num_threads(threads)
    import transformers  # noqa: F401  (its own memory is not the model's)

    before = resident_bytes()
    loaded = load(model.path, device=device, dtype=dtype, method=model.method)
    place = loaded.kernel.device
    known = reset_peak_memory()  # loading's peak is not running's
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    found = profile.speed(loaded.model, p.prompt_len, p.new_tokens, p.repeats)
    if place.type == "cuda":
        peak: int | None = torch.cuda.max_memory_allocated(place)
    else:
        peak = peak_memory() - before if known else None
    return {**asdict(found), "peak_bytes": peak}


def _earlier(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"models": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(found, dict) and found["format"] == FORMAT
        good = good and all(isinstance(entry, dict) for entry in found["models"].values())
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        good = False
    if not good:
        raise RunError(
            str(path),
            expected="a profile of this version",
            got="something else",
            cure="Give another directory with -o, or remove the file",
        )
    return dict(found)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"text {path}", expected="a text file in UTF-8", got=error, cure="Convert it first"
        ) from error


def _identity(model: Model) -> list[Any]:
    found: list[Any] = [model.method]
    try:
        for file in sorted(Path(model.path).iterdir()):
            if file.is_file():
                found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    except OSError as error:
        raise CheckpointError(f"checkpoint {model.path}", got=error.strerror) from error
    return found


def _machine(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return device_name("cuda" if device == "auto" else device)
    return f"{device_name('cpu')} {torch.backends.cpu.get_cpu_capability()}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
