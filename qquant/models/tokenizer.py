"""A checkpoint's tokenizer, loaded one way for calibration and for running.

Original Qwen's is ours (`qwen/tokenization_qwen.py`, made known by `register`), the others are
transformers' own. What goes wrong inside is told as one error: broken tokenizer files raise almost
anything, bare `Exception` and the panics of Rust code included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, QQuantError
from . import register


def load_tokenizer(source: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, from its own files.

    Args:
        source: an opened directory.
        trust_remote_code: let transformers run the directory's own Python; no Qwen needs it.

    Raises:
        CheckpointError: its files are missing or broken.
    """
    from transformers import AutoTokenizer

    register()
    with tokenizer_errors(f"tokenizer of {source.path.name}"):
        return AutoTokenizer.from_pretrained(
            str(source.path), trust_remote_code=trust_remote_code, local_files_only=True
        )


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Whatever goes wrong inside of a tokenizer, as one kind of error.

    Raises:
        CheckpointError: with what went wrong.
    """
    try:
        yield
    except QQuantError:
        raise
    except BaseException as error:
        # A panic in the tokenizers library is no Exception; Ctrl-C is none either.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            what,
            expected="readable tokenizer files (qwen.tiktoken, or tokenizer.json)",
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            cure="Copy the tokenizer files of the model this checkpoint was made from into it",
        ) from error
