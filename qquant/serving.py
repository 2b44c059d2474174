"""`transformers serve` for any directory, original Qwen's included: an OpenAI-compatible server.

The server is transformers' own (`transformers.cli`), untouched: endpoints, options, streaming and
loading are what `transformers serve` has. Qwen1.5 and later, and original Qwen converted to a
native `qwen2` directory, need nothing from here. Original Qwen does, for two reasons that
`--trust-remote-code` does not mend (seen in transformers 5.17 to 5.23):

- the server looks the model's class up by name in the namespace of transformers, where the code
  beside the weights never is;
- it decodes a stream with the Rust tokenizer inside of a fast tokenizer, and Qwen's is `tiktoken`.

So in a process of its own, `serve` makes the class known under that name and gives the tokenizer a
Rust twin that only decodes; unfinished UTF-8 characters are then held back as for any other model.
Where a chat model's generation_config.json names no `<|im_end|>`, as published, answers end there
all the same. None of the directory's own code runs.

What the server would answer wrongly from is refused before it starts: quantized directories that
plain transformers does not read (`readers.py` has the rules), continuous batching where original
Qwen's tricks for long prompts are on, and paths that the server takes apart. Experts of a mixture
that has them apart are taken apart in transformers' class, too, as the model card tells a reader.

Left out on purpose: a server of our own, and `qquant.load`'s kernels in this one (GPTQ directories
go through gptqmodel here).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from . import compressed, compressed_layout
from .checkpoint import Checkpoint
from .directory import read_json
from .errors import CheckpointError, MissingDependencyError
from .layout import Layout
from .models import register
from .models.families import Family, family_of
from .models.tokenizer import tokenizer_errors
from .readers import verdicts

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
# What reads a method's directories, and the extra of ours that brings it.
_READERS: dict[str, tuple[tuple[str, ...], str]] = {
    "gptq": (("gptqmodel", "optimum"), "readers"),
    "bitsandbytes": (("bitsandbytes",), "bnb"),
    "compressed-tensors": (("compressed_tensors",), "compressed"),
}
_GENERATION, _RANKS = "generation_config.json", "qwen.tiktoken"


def serve(path: str | os.PathLike[str], arguments: Sequence[str] = ()) -> None:
    """Serve the directory `path` until interrupted.

    Args:
        path: a checkpoint directory, quantized or not; clients name it as their model, in the same
            spelling (`transformers serve` compares the two as text).
        arguments: further options of `transformers serve`, such as `["--port", "8001"]`.

    Raises:
        CheckpointError: no directory that can be served.
        MissingDependencyError: the server's packages, or the reader's, are not installed.
        SystemExit: the server ended, or did not know an option.
    """
    if "@" in os.fspath(path):
        raise CheckpointError(
            f"path {os.fspath(path)}",
            expected="no @ in it: transformers' server reads what follows as a revision",
            got="one",
            cure="Name the directory by a path without it, as from inside its parent, or by a link",
        )
    checkpoint = Checkpoint.open(path)
    family = family_of(checkpoint.config)
    _check_packages(checkpoint, family)
    _check_readable(checkpoint)
    if family.remote_code:
        _check_batching(checkpoint, arguments)
        make_known(_message_end(checkpoint))
    if family.experts and _method(checkpoint) == "gptq":
        _take_apart(family)
    from transformers.cli.transformers import app

    place = () if _method(checkpoint) != "gptq" else _place(arguments)
    app(["serve", os.fspath(path), *place, *arguments], prog_name="transformers")


def make_known(message_end: int | None = None) -> None:
    """Make original Qwen's model and tokenizer known to transformers' server, in this process.

    Args:
        message_end: an id that ends every answer, beside those of generation_config.json.
    """
    from transformers import AutoTokenizer
    from transformers.cli.serving import model_manager

    from .models.qwen.configuration_qwen import QWenConfig
    from .models.qwen.tokenization_qwen import QWenTokenizer

    register()
    # Through the server's own name for it: importing transformers' parts may replace the module.
    model_manager.transformers.QWenLMHeadModel = served_model(message_end)

    class StreamedTokenizer(QWenTokenizer):
        """Qwen's tokenizer with the Rust twin where the server looks for it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tokenizer._tokenizer = rust_decoder(self)

    StreamedTokenizer.__name__ = QWenTokenizer.__name__  # what tokenizer_config.json calls it
    AutoTokenizer.register(QWenConfig, StreamedTokenizer, exist_ok=True)


def served_model(message_end: int | None) -> type:
    """`QWenLMHeadModel`, whose answers also end at `message_end` once it is loaded."""
    from .models.qwen.modeling_qwen import QWenLMHeadModel

    class Served(QWenLMHeadModel):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            loaded = super().from_pretrained(*args, **kwargs)
            settings = (loaded[0] if isinstance(loaded, tuple) else loaded).generation_config
            ends = settings.eos_token_id
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            if message_end is not None and message_end not in ends:
                settings.eos_token_id = [*ends, message_end]
            return loaded

    Served.__name__ = QWenLMHeadModel.__name__
    return Served


def _message_end(checkpoint: Checkpoint) -> int | None:
    """The id of `<|im_end|>` where the directory is a chat model in ChatML, else None."""
    from .models.qwen.tokenization_qwen import IM_END, SPECIAL_TOKENS, load_ranks

    there = [(checkpoint.path / name).is_file() for name in (_GENERATION, _RANKS)]
    if not all(there) or read_json(checkpoint.path, _GENERATION).get("chat_format") != "chatml":
        return None
    with tokenizer_errors(f"{_RANKS} of {checkpoint.path.name}"):
        return len(load_ranks(checkpoint.file(_RANKS))) + SPECIAL_TOKENS.index(IM_END)


def rust_decoder(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` that turns the ids of a `QWenTokenizer` into text, and only that.

    Decoding needs each id's bytes, not the merges, so a word-level model of the byte-level strings
    does, with the byte-level decoder behind it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    rust = Tokenizer(models.WordLevel(tokenizer.get_vocab(), unk_token=None))
    rust.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    rust.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return rust


def _method(checkpoint: Checkpoint) -> str | None:
    method = (checkpoint.quantization_config or {}).get("quant_method")
    return None if method is None else str(method)


def _check_packages(checkpoint: Checkpoint, family: Family) -> None:
    """Names what is missing before transformers does, which would load the model first.

    Raises:
        MissingDependencyError, CheckpointError: see `serve`.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            "qquant serve",
            expected=f"the packages of transformers' server ({', '.join(_NEEDED)})",
            got=f"no {', '.join(missing)}",
            cure="pip install 'qquant[serve]'",
        )
    method = _method(checkpoint) or ""
    needs, extra = _READERS.get(method, ((), ""))
    needs += ("defuser",) if method == "gptq" and family.experts else ()
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"serving a directory quantized with {method}",
            expected=" and ".join(needs),
            got=f"no {', '.join(missing)}",
            cure=f"pip install 'qquant[{extra}]'",
        )
    template = os.path.lexists(checkpoint.path / "chat_template.jinja") or (
        os.path.lexists(checkpoint.path / "tokenizer_config.json")
        and read_json(checkpoint.path, "tokenizer_config.json").get("chat_template")
    )
    if not (template or family.remote_code):
        raise CheckpointError(
            f"{checkpoint.path.name}: chat template",
            expected="one in chat_template.jinja or tokenizer_config.json, to lay out messages by",
            got="none",
            cure="Copy it from the chat model of this family; base models have none",
        )


def _check_readable(checkpoint: Checkpoint) -> None:
    """Refuses quantized directories of which plain transformers, the server's, would make nonsense.

    Raises:
        CheckpointError: it is one; says which rule is against it.
    """
    name, quant = checkpoint.path.name, checkpoint.quantization_config
    if quant is None:
        return
    if "quantization_config" not in checkpoint.config:
        raise CheckpointError(
            f"{name}: config.json: quantization_config",
            expected="there, as transformers reads it nowhere else",
            got="only a file beside it",
            cure='Copy the file\'s content there, with "quant_method": "gptq" in it',
        )
    why: tuple[str, ...] = ()
    if _method(checkpoint) == "gptq":
        why = verdicts(checkpoint.path)[0].why
    elif _method(checkpoint) == compressed_layout.METHOD:
        if not Layout.parse(compressed.view(checkpoint).quantization_config or {}).sym:
            why = ("packed zero points, which it reads with dequantize=True only",)
    if why:
        raise CheckpointError(
            f"{name}: serving it",
            expected="a directory that plain transformers reads, since the server is its",
            got="; ".join(why),
            cure="`qquant inspect --readers` says who else reads it, with a server or without",
        )


def _check_batching(checkpoint: Checkpoint, arguments: Sequence[str]) -> None:
    """Refuses continuous batching where it would change original Qwen's answers.

    Raises:
        CheckpointError: it is asked for, and dynamic NTK or logn is on.
    """
    asked = [a for a in arguments if a in ("--continuous-batching", "--no-continuous-batching")]
    keys = ("use_dynamic_ntk", "use_logn_attn")
    on = [key for key in keys if checkpoint.config.get(key, True)]  # on where nothing is said
    if on and asked[-1:] == ["--continuous-batching"]:
        raise CheckpointError(
            "--continuous-batching",
            expected=f"{' and '.join(on)} false in config.json: requests lie in one row then, in "
            "which the two tell no prompts apart",
            got="true",
            cure="Leave the option out, or serve what `qquant convert --to qwen2` makes of it, "
            "which does without them",
        )


def _place(arguments: Sequence[str]) -> tuple[str, ...]:
    """The CPU by name where there is nothing else and no device is asked for: for `auto`,
    gptqmodel (7.6) takes a kernel for GPUs where torch is built for CUDA."""
    import torch

    asked = any(a.partition("=")[0] == "--device" for a in arguments)
    return () if asked or torch.accelerator.is_available() else ("--device", "cpu")


def _take_apart(family: Family) -> None:
    """Lets transformers' class of this mixture have its experts apart, as the directory has them.

    Raises:
        MissingDependencyError: the package that does it does not for this transformers.
    """
    from defuser import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        replace_fused_blocks,
    )

    if not replace_fused_blocks(family.model_type):
        raise MissingDependencyError(
            f"serving experts of {family.model_type}",
            expected="a defuser that takes them apart in transformers' class",
            got="one that does not, for this transformers",
            cure="pip install -U 'qquant[readers]'",
        )
