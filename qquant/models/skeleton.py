"""A model of which only one block has weights at a time.

Owns the meta-device model that the walk runs through: it is built without memory, block `i` gets
its tensors read from the checkpoint when its turn comes and loses them afterwards, so memory does
not grow with depth. The embedding is looked up slice by slice, and what a block is given beside the
hidden states (masks, rotary tables) is taken from the model's own forward, run once per batch shape
with its blocks replaced by recorders: no assumption about a family's signature is written here.

Left out on purpose: logits. Nothing here can run a whole model (`runtime.py` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import attention
from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..finite import all_finite
from . import fused_blocks
from .experts import split_experts
from .families import Family
from .shapes import missing_tensor, wrong_shape

_ROWS = 16384  # of the embedding, read at a time


class _Recorder(nn.Module):
    """Stands where a block stood: notes what it is given and passes the hidden states on."""

    def __init__(self, block: nn.Module, seen: list[dict[str, Any]], last: bool) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule: attributes only
        self._seen, self._last = seen, last

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self._seen.append(kwargs)
        if self._last:
            raise _Recorded
        return hidden_states


class _Recorded(Exception):
    """The last block was reached; what follows it is not needed."""


class Skeleton:
    """The model on the meta device, and the means to give one block its weights.

    Args:
        checkpoint: the source.
        family: its row of the families table.
        device, dtype: where and in what a block computes.
        int16: its attention, in 16-bit integers; whoever runs blocks makes their products so.

    Attributes:
        linears: of each block, those to quantize, by their names inside it.

    Raises:
        CheckpointError: config.json does not make a model, or tensors do not fit it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        int16: bool = False,
    ) -> None:
        self.checkpoint, self.family, self.device, self.dtype = checkpoint, family, device, dtype
        self.int16 = int16
        self.config, self.model = _build(checkpoint, family)
        attention.use(self.config, device, dtype, int16)
        split_experts(self.model, family, visit_all=True)
        fused_blocks.use(self.model, device)
        self.blocks: nn.ModuleList = self.model.get_submodule(family.blocks)
        self._body = self.model.get_submodule(family.blocks.rpartition(".")[0])
        rotary = getattr(self._body, "rotary_emb", None)
        if (
            rotary is not None
        ):  # its tables are computed, not loaded, so meta would leave them empty
            self._body.rotary_emb = type(rotary)(config=self.config).to(device)
        self._check_shapes()
        by_block = family.by_block(checkpoint.tensors)
        self.linears = [by_block.get(i, ()) for i in range(len(self.blocks))]
        self._kwargs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._rehearse()

    def _check_shapes(self) -> None:
        have = self.checkpoint.tensors
        shapes = dict(self.model.named_parameters(remove_duplicate=False))
        for name in self.family.linear_names(have):
            if f"{name}.weight" not in shapes:
                raise CheckpointError(
                    f"{name}.weight",
                    expected="no such tensor in a model of this config.json",
                    got=tuple(have[f"{name}.weight"].shape),
                    cure="config.json and the weights are not of the same model",
                )
        for name in self.parameters:
            if name not in have:
                raise missing_tensor(name, have)
            if tuple(have[name].shape) != tuple(shapes[name].shape):
                raise wrong_shape(name, tuple(shapes[name].shape), tuple(have[name].shape))

    def _rehearse(self) -> None:
        """Two tokens through every block, without weights: what config.json says can be computed.

        A class takes many a value without looking at it and stumbles in its forward.
        """
        try:
            for block, kwargs in zip(self.blocks, self.block_kwargs(1, 2), strict=True):
                hidden = torch.zeros(1, 2, self.config.hidden_size, device="meta", dtype=self.dtype)
                block(hidden, **tree_map(_to_meta, kwargs))
        except Exception as e:  # as in `_build`
            raise _not_a_model(self.family, e) from e

    @property
    def stored_dtype(self) -> str:
        """Of the linears in the checkpoint, as safetensors spells it."""
        first = self.family.first_linear(self.checkpoint.tensors)
        return self.checkpoint.info(f"{first}.weight").dtype

    @property
    def tied(self) -> bool:
        """Whether lm_head is the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def embed(self, ids: Tensor) -> Tensor:
        """[n, t] int64 -> [n, t, hidden] on the CPU in the compute dtype; see `embed_into`."""
        width = self.checkpoint.info(self.family.embedding).shape[1]
        out = torch.empty(*ids.shape, width, dtype=self.dtype)
        self.embed_into([ids], [out])
        return out

    def embed_into(self, ids: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Embeddings of some batches, in the compute dtype, then rounded to where they are put.

        The table is read in slices of rows, so that it is never in memory as a whole.

        Args:
            ids: [n, t] int64 each.
            outs: [n, t, hidden] each, on the CPU, written to.

        Raises:
            CheckpointError: an id has no row.
        """
        name = self.family.embedding
        rows = self.checkpoint.info(name).shape[0]
        least, most = min(int(i.min()) for i in ids), max(int(i.max()) for i in ids)
        if most >= rows or least < 0:
            raise CheckpointError(
                name,
                expected=f"token ids below its {rows} rows",
                got=f"id {most if most >= rows else least}",
                cure="The tokenizer files are not this model's",
            )
        for start in range(0, rows, _ROWS):
            stop = min(start + _ROWS, rows)
            inside = [(i >= start) & (i < stop) for i in ids]
            if not any(bool(here.any()) for here in inside):
                continue
            table = self.checkpoint.read_rows(name, start, stop)
            for batch, out, here in zip(ids, outs, inside, strict=True):
                if bool(here.any()):
                    picked = table[batch[here] - start]
                    need_finite(name, picked)
                    out[here] = picked.to(self.dtype).to(out.dtype)

    def block_kwargs(self, batch: int, tokens: int) -> list[dict[str, Any]]:
        """What each block takes beside hidden states for a full [batch, tokens] without padding."""
        key = (batch, tokens)
        if key not in self._kwargs:
            seen: list[dict[str, Any]] = []
            blocks, attribute = self.blocks, self.family.blocks.rpartition(".")[2]
            last = len(blocks) - 1
            stand_ins = [_Recorder(b, seen, i == last) for i, b in enumerate(blocks)]
            hidden = torch.zeros(
                batch, tokens, self.config.hidden_size, device=self.device, dtype=self.dtype
            )
            setattr(self._body, attribute, nn.ModuleList(stand_ins))
            try:
                with torch.no_grad():
                    self._body(inputs_embeds=hidden, use_cache=False)
            except _Recorded:
                pass
            finally:
                setattr(self._body, attribute, blocks)
            self._kwargs[key] = seen
        return self._kwargs[key]

    def read(self, index: int) -> dict[str, Tensor]:
        """The weights of block `index` as they are stored, checked; any thread may do so.

        They are on the host, and on their way to a GPU in pinned memory.

        Raises:
            CheckpointError: a weight is not finite; the tensor is named.
        """
        prefix = f"{self.family.blocks}.{index}."
        found: dict[str, Tensor] = {}
        for name, _ in self.blocks[index].named_parameters():
            tensor = self.checkpoint.read(prefix + name)
            need_finite(prefix + name, tensor)
            found[name] = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return found

    def load(self, index: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
        """Block `index` with its weights; `drop` it when done.

        Args:
            weights: from `read`, which empties it; None reads them now.

        Raises:
            CheckpointError: as `read`.
        """
        block = self.blocks[index]
        weights = self.read(index) if weights is None else weights
        state = {
            name: weights.pop(name).to(device=self.device, dtype=self.dtype, non_blocking=True)
            for name in list(weights)
        }
        block.load_state_dict(state, strict=False, assign=True)
        return block.requires_grad_(False)

    def drop(self, index: int) -> None:
        """Gives back the memory of block `index`."""
        self.blocks[index].to_empty(device="meta")

    @property
    def parameters(self) -> list[str]:
        """Names of all the model's tensors, in the model's order, a tied head left out."""
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        return [n for n in names if not (self.tied and n == self.family.head)]


def need_finite(name: str, tensor: Tensor) -> None:
    """Refuses a source tensor with NaN or infinite values.

    Raises:
        CheckpointError: names the tensor.
    """
    if not all_finite(tensor):
        raise CheckpointError(
            name,
            expected="finite weights",
            got=f"{int((~torch.isfinite(tensor)).sum())} NaN or Inf values",
            cure="The source is damaged: download or save it again",
        )


def _build(checkpoint: Checkpoint, family: Family) -> tuple[Any, Any]:
    """(config, model on the meta device), from config.json and nothing else: no remote code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {k: v for k, v in checkpoint.config.items() if k not in ("auto_map", "model_type")}
    try:
        if family.remote_code:
            from .qwen.configuration_qwen import QWenConfig
            from .qwen.modeling_qwen import QWenLMHeadModel

            config = QWenConfig(**values)
            with torch.device("meta"):
                model = QWenLMHeadModel(config)
        else:
            config = AutoConfig.for_model(family.model_type, **values)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
    except Exception as e:  # whatever a config class raises over values it was not made for
        raise _not_a_model(family, e) from e
    return config, model.eval()


def _not_a_model(family: Family, error: Exception) -> CheckpointError:
    return CheckpointError(
        "config.json",
        expected=f"values that make a {family.model_type} model",
        got=f"{type(error).__name__}: {error}",
        cure="Restore config.json from the model this checkpoint was made from",
    )


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
