"""What a block says about itself when a short input runs through it, before the walk does.

Which linears share an input is not looked up: a short probe records who is handed the same tensor
object. A stopped frame keeps every local alive, needed or not (at the attention's output projection
that is queries, keys, values and more: several times what has to be kept). Which of them are dead
is not guessed: the short input runs again with those tensors replaced by NaN, and the real run
drops only what left the output bit for bit the same.

Left out on purpose: the walk itself (`walk.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..models.experts import Experts
from .batch import Batch, Key, Kwargs
from .walk import BlockWalk, linear_of


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
