"""Token files: what every tool is calibrated on, and what every result is measured on.

A token file is a safetensors file with one tensor, `tokens`, int64 [n, seq]. Text is read with
the checkpoint's own tokenizer, joined, and cut into windows of `seq` tokens spread evenly over it
without overlap; special tokens in the text are not parsed. `random` ids serve where only time
counts. `library` is the text the demo checkpoint was trained on (`scripts/demo_corpus.py`: the
running Python's own library, split by file), without the files that are held out. `builtin` is
qquant's own calibration set, its conversations written out as plain text, turn after turn: text of
another domain than any model trained here.

    python benchmarks/token_files.py text CHECKPOINT OUT.safetensors FILE ... --samples 128
    python benchmarks/token_files.py library CHECKPOINT OUT.safetensors --samples 128
    python benchmarks/token_files.py builtin CHECKPOINT OUT.safetensors --samples 128
    python benchmarks/token_files.py random CHECKPOINT OUT.safetensors --samples 128
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def windows(ids: list[int], samples: int, seqlen: int) -> Tensor:
    """int64 [samples, seqlen] evenly spread windows.

    Raises:
        ValueError: the text is too short for that many.
    """
    if len(ids) < samples * seqlen:
        raise ValueError(
            f"expected at least {samples * seqlen} tokens of text, got {len(ids)}; "
            f"ask for --samples {len(ids) // seqlen} or give more text"
        )
    step = (len(ids) - seqlen) // max(samples - 1, 1)
    return torch.tensor([ids[i * step : i * step + seqlen] for i in range(samples)])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, special tokens' surface forms taken as plain text."""
    if type(tokenizer).__name__ == "QWenTokenizer":
        return list(tokenizer.encode(text, allowed_special=set(), disallowed_special=()))
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def read_text(kind: str, files: list[Path]) -> str:
    """The joined text of the files, of the demo's training corpus or of the builtin set."""
    if kind == "text":
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    if kind == "builtin":
        from qquant.calibration.sources import BUILTIN, read_source

        return "\n\n".join(plain(document) for document in read_source(BUILTIN).documents)
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from demo_corpus import read_corpus

    return "\n\n".join(text for _, text in read_corpus().train)


def plain(document: Any) -> str:
    """A calibration document as text: its own, or its turns with a blank line between."""
    if hasattr(document, "text"):
        return str(document.text)
    return "\n\n".join(message.content for message in document.messages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["text", "library", "builtin", "random"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "random":
        vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(args.seed)
        tokens = torch.randint(0, vocab, (args.samples, args.seqlen), generator=generator)
    else:
        from transformers import AutoTokenizer

        import qquant

        qquant.register()
        tokenizer = AutoTokenizer.from_pretrained(str(args.checkpoint))
        text = read_text(args.kind, args.files)
        tokens = windows(encode(tokenizer, text), args.samples, args.seqlen)
    save_file({"tokens": tokens}, str(args.output))


if __name__ == "__main__":
    main()
