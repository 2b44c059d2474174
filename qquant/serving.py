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
None of the directory's own code runs.

Left out on purpose: a server of our own, and `qquant.load`'s kernels in this one (GPTQ directories
go through gptqmodel here).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .checkpoint import Checkpoint
from .directory import read_json
from .errors import CheckpointError, MissingDependencyError
from .models import register
from .models.families import family_of

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


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
    checkpoint = Checkpoint.open(path)
    family = family_of(checkpoint.config)
    _check_packages(checkpoint)
    if family.remote_code:
        make_known()
    from transformers.cli.transformers import app

    app(["serve", os.fspath(path), *arguments], prog_name="transformers")


def make_known() -> None:
    """Make original Qwen's model and tokenizer known to transformers' server, in this process."""
    from transformers import AutoTokenizer
    from transformers.cli.serving import model_manager

    from .models.qwen.configuration_qwen import QWenConfig
    from .models.qwen.modeling_qwen import QWenLMHeadModel
    from .models.qwen.tokenization_qwen import QWenTokenizer

    register()
    # Through the server's own name for it: importing transformers' parts may replace the module.
    model_manager.transformers.QWenLMHeadModel = QWenLMHeadModel

    class StreamedTokenizer(QWenTokenizer):
        """Qwen's tokenizer with the Rust twin where the server looks for it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tokenizer._tokenizer = rust_decoder(self)

    StreamedTokenizer.__name__ = QWenTokenizer.__name__  # what tokenizer_config.json calls it
    AutoTokenizer.register(QWenConfig, StreamedTokenizer, exist_ok=True)


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


def _check_packages(checkpoint: Checkpoint) -> None:
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
    method = (checkpoint.quantization_config or {}).get("quant_method")
    readers = {"gptq": ("gptqmodel", "optimum"), "bitsandbytes": ("bitsandbytes",)}
    missing = [name for name in readers.get(str(method), ()) if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"serving a directory quantized with {method}",
            expected=f"{' and '.join(readers[str(method)])}",
            got=f"no {', '.join(missing)}",
            cure=f"pip install 'qquant[{'readers' if method == 'gptq' else 'bnb'}]'",
        )
    template = os.path.lexists(checkpoint.path / "chat_template.jinja") or (
        os.path.lexists(checkpoint.path / "tokenizer_config.json")
        and read_json(checkpoint.path, "tokenizer_config.json").get("chat_template")
    )
    if not (template or family_of(checkpoint.config).remote_code):
        raise CheckpointError(
            f"{checkpoint.path.name}: chat template",
            expected="one in chat_template.jinja or tokenizer_config.json, to lay out messages by",
            got="none",
            cure="Copy it from the chat model of this family; base models have none",
        )
