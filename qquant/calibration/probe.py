"""What a block says about itself when a short input runs through it, before the walk does.

Which linears share an input is not looked up: a short probe records who is handed the same tensor
object. A stopped frame keeps every local alive, needed or not (at the attention's output projection
that is queries, keys, values and more: several times what has to be kept). Which of them are dead
is not guessed: the short input runs again with those tensors replaced by NaN, and the real run
drops only what left the output bit for bit the same. And whether the last linear's input follows
from the residual stream alone is tried, too.

Left out on purpose: the walk itself (`walk.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..models.experts import Experts
from .batch import Batch, Key, Kwargs, Recompute
from .walk import BlockWalk, is_norm, linear_of


def shared_inputs(
    block: nn.Module, names: Sequence[str], hidden: Tensor, kwargs: Kwargs
) -> list[tuple[str, ...]]:
    """Runs a short input through the block and groups the linears by the tensor they are handed.

    Args:
        block: one decoder block with its weights.
        names: the linears' names inside the block.
        hidden: [1, t, hidden], any short t; kwargs: what the block takes beside it.

    Returns:
        Groups in the order of their first call.

    Raises:
        RunError: a linear is called twice or never.
    """
    seen: dict[int, list[str]] = {}
    alive: list[Tensor] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])  # keeps the object, so that its id stays its own
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    hooks = [block.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    try:
        with torch.inference_mode():
            block(hidden, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    called = [n for group in seen.values() for n in group]
    if sorted(called) != sorted(names):
        raise RunError(
            "linears of a block",
            expected=f"each of {sorted(names)} called once",
            got=sorted(called),
            cure="This block's structure is not supported",
        )
    return [tuple(group) for group in seen.values()]


def droppable(
    block: nn.Module, groups: Sequence[tuple[str, ...]], hidden: Tensor, kwargs: Kwargs
) -> dict[int, frozenset[Key]]:
    """Which locals of the stopped frames are dead at each stop, found by trying.

    The block runs on a short input with those tensors replaced by NaN; a key is kept only if the
    output stays bit for bit the same. Control flow of a block does not depend on values (which
    experts run does, but no stopped frame is theirs), so what is dead for this input is dead for
    every input of the same number of dimensions.

    Args:
        block, groups: as for `BlockWalk`.
        hidden: [1, t, hidden], any short t; kwargs: what the block takes beside it.
    """

    def output(stop: int, keys: Collection[Key] | None) -> tuple[Tensor, set[Key]]:
        """The block's output with `keys` (all, if None) poisoned at a stop, and the keys there."""
        walk = BlockWalk(block, groups)
        batch = Batch(walk.home, False, hidden.clone(), kwargs)
        undo = walk.replace_forwards()
        there: set[Key] = set()
        try:
            with torch.inference_mode():
                for i, stage in enumerate(walk.stages):
                    batch.advance()
                    if i == stop:
                        there = set(batch.locals)
                        for key in there if keys is None else keys:
                            batch.locals[key].data = torch.full_like(batch.locals[key], torch.nan)
                    batch.locals = {}
                    if stage.experts is not None:
                        assert batch.x is not None and batch.routing is not None
                        batch.answer = Experts.forward(stage.experts, batch.x, *batch.routing)
                    for name in stage.names:
                        walk.solved[name] = linear_of(block, name).weight
                out = batch.advance()
        finally:
            undo()
        assert out is not None
        return out, there

    want, _ = output(-1, ())
    dead = {}
    for stop in range(len(BlockWalk(block, groups).stages)):
        got, keys = output(stop, None)
        if not torch.equal(got, want):
            keys = {k for k in keys if torch.equal(output(stop, [k])[0], want)}
        dead[stop] = frozenset(keys)
    return dead


def recomputable(
    block: nn.Module, groups: Sequence[tuple[str, ...]], hidden: Tensor, kwargs: Kwargs
) -> Recompute | None:
    """How the last linear's input can be made again from the residual stream, found by trying.

    The short input runs through the block, and what was handed to the last norm runs again through
    that norm and the module around the linear: the linear has to be handed the same bits.

    Args:
        block, groups: as for `BlockWalk`.
        hidden: [1, t, hidden], any short t; kwargs: what the block takes beside it.

    Returns:
        None where it cannot: the last linears are experts', several share that input, or more goes
        into it than the residual.
    """
    name = groups[-1][0]
    inner = name.rpartition(".")[0]
    mixture = any(isinstance(module, Experts) for module in block.modules())
    if mixture or not inner or len(groups[-1]) > 1:
        return None
    norms: list[tuple[str, Tensor]] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any], int]] = []
    inputs: list[Tensor] = []

    def at_norm(child: str) -> Callable[..., None]:
        return lambda _, args: norms.append((child, args[0]))

    hooks = [
        child.register_forward_pre_hook(at_norm(n))
        for n, child in block.named_children()
        if is_norm(child)
    ]
    hooks.append(
        block.get_submodule(inner).register_forward_pre_hook(
            lambda _, args, more: calls.append((args, more, len(norms))), with_kwargs=True
        )
    )
    hooks.append(linear_of(block, name).register_forward_pre_hook(lambda _, a: inputs.append(a[0])))
    try:
        with torch.inference_mode():
            block(hidden, **kwargs)
            if len(calls) != 1 or len(calls[0][0]) != 1 or calls[0][1] or not calls[0][2]:
                return None
            norm, residual = norms[calls[0][2] - 1]
            block.get_submodule(inner)(block.get_submodule(norm)(residual))
    finally:
        for hook in hooks:
            hook.remove()
    same = len(inputs) == 2 and torch.equal(*inputs)
    return Recompute(norm, inner, name) if same else None
