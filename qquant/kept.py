"""A reference model without its body: hidden states in a file, and the matrix that reads them.

Logits of a whole text are vocabulary times tokens; the last hidden states are some forty times
fewer, and all that logits need beside the vocabulary matrix. They lie in a mapped file, so neither
is ever in memory as a whole. Beside the states stands a small file with the token ids and the
vocabulary matrix, written last: where it is there, the states are complete, and the same text can
be compared with another model later without running, or loading, the reference again.

What the states depend on is the caller's to say: the name of the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError, TargetError


class KeptReference:
    """Stands in for the reference in `profile.compare_all`, on the ids that it was kept for.

    Attributes:
        ids: int64 [n, seq], every row that can be asked for.
    """

    def __init__(self, ids: Tensor, states: Tensor, head: Any) -> None:
        self.ids, self._states, self._head = ids, states, head
        self._places = {_key(row): i for i, row in enumerate(ids)}

    @classmethod
    def keep(
        cls, model: Any, ids: Tensor, hidden: Iterator[Tensor], folder: Path, name: str
    ) -> KeptReference:
        """Writes the states, and gives what reads them.

        Args:
            model: see `profile`; only its vocabulary matrix is used, and may be dropped afterwards.
            ids: int64 [n, seq]. hidden: the model's last hidden states for them, [b, seq, hidden]
                a few rows at a time.
            folder, name: where the files are made, and what they are called.

        Raises:
            TargetError: the states do not fit the disk.
        """
        head = model.get_output_embeddings()
        file = folder / f"{name}.states"
        states, done = torch.empty(0), 0
        for part in hidden:
            if not done:
                shape = (*ids.shape, part.shape[-1])
                states = _file(file, shape, part.dtype, fresh=True)
            states[done : done + len(part)].copy_(part)
            done += len(part)
        # A head of another kind (quantized) is kept as it is, in memory, and for this run only.
        if type(head) is nn.Linear:
            _seal(folder / f"{name}.safetensors", file, ids, states, head)
        return cls(ids, states, head)

    @classmethod
    def open(cls, folder: Path, name: str, device: torch.device) -> KeptReference | None:
        """What an earlier `keep` wrote; None where there is nothing, or only a part of it."""
        seal, file = folder / f"{name}.safetensors", folder / f"{name}.states"
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(seal, framework="pt") as stored:
                dtype = getattr(torch, stored.metadata()["dtype"])
                parts = {key: stored.get_tensor(key) for key in stored.keys()}
            size = file.stat().st_size
        except (OSError, SafetensorError):
            return None
        ids, weight = parts["ids"], parts["weight"]
        head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts, device="meta")
        head.weight = nn.Parameter(weight.to(device), requires_grad=False)
        if "bias" in parts:
            head.bias = nn.Parameter(parts["bias"].to(device), requires_grad=False)
        shape = (*ids.shape, weight.shape[1])
        if size != torch.Size(shape).numel() * dtype.itemsize:  # it would be filled with zeros
            return None
        states = _file(file, shape, dtype, fresh=False)
        return cls(ids, states, head)

    def get_output_embeddings(self) -> Any:
        return self._head

    def get_input_embeddings(self) -> Any:
        return self._head

    def base_model(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """What the model's body gave for these rows, as its result.

        Raises:
            SpecError: a row was not among the ids that were kept.
        """
        try:
            at = [self._places[_key(row.cpu())] for row in input_ids]
        except KeyError as error:
            raise SpecError(
                "token ids",
                expected="those of the reference",
                got="others",
                cure="Compare models of one tokenizer",
            ) from error
        return SimpleNamespace(last_hidden_state=self._states[at].to(input_ids.device))


def _key(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def _file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, fresh: bool) -> Tensor:
    """A tensor that is the file's contents."""
    count = torch.Size(shape).numel()
    if fresh:
        try:
            with path.open("wb") as file:  # a hole would be a SIGBUS on a full disk
                os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise TargetError(
                str(path),
                expected=f"room for {count * dtype.itemsize} bytes of the reference's states",
                got=error.strerror,
                cure="Free disk room, or use fewer --max-tokens",
            ) from error
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def _seal(path: Path, file: Path, ids: Tensor, states: Tensor, head: nn.Linear) -> None:
    from safetensors.torch import save_file

    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    parts = {"ids": ids.contiguous(), "weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        parts["bias"] = head.bias.detach().cpu().contiguous()
    fresh = path.with_suffix(".part")
    save_file(parts, fresh, {"dtype": str(states.dtype).removeprefix("torch.")})
    os.replace(fresh, path)
