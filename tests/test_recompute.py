"""Inputs of a block's last linear made again from the residual stream: the same ones, no others."""

from __future__ import annotations

import pytest
import torch
from test_walk import BATCHES, MAKERS, TOKENS, batches, coarse, native_block
from torch import Tensor

from qquant.calibration.batch import Recompute
from qquant.calibration.hold import Holder
from qquant.calibration.probe import droppable, recomputable, shared_inputs
from qquant.calibration.walk import Arrival, BlockWalk, linear_of

LAST = {"qwen": "mlp.c_proj", "qwen2": "mlp.down_proj", "qwen3": "mlp.down_proj"}


def run_again(
    model_type: str, holder: Holder, rounding: torch.dtype | None, shares: list[bool], last: bool
) -> tuple[BlockWalk, list[Arrival], list[Tensor]]:
    """A walk that may make inputs again; the second stream where `shares` says so."""
    block, kwargs, linears, residual = MAKERS[model_type](model_type)
    hidden = batches()
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)
    drops = droppable(block, groups, hidden[0][:1], kwargs)
    again = recomputable(block, groups, hidden[0][:1], kwargs)
    weights = {n: block.get_submodule(n).weight.detach().clone() for n in linears}
    arrivals: list[Arrival] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals.append(arrival)
        return {n: coarse(weights[n]) for n in arrival.names}

    walk = BlockWalk(
        block,
        groups,
        residual=residual,
        holder=holder,
        hold_dtype=rounding,
        drops=drops,
        again=again,
        unit=1,
    )
    streams = [[h.clone() if rounding is None else h.to(rounding) for h in hidden]]
    if any(shares):
        full = [h + 0.01 if f else h[:0] for h, f in zip(streams[0], shares, strict=True)]
        streams.append(full)
    walk.run(streams, [kwargs] * BATCHES, solve, last=last)
    return walk, arrivals, [h for stream in streams for h in stream]


@pytest.mark.parametrize("shares", [[False] * 3, [True, True, False]])
@pytest.mark.parametrize("rounding", [None, torch.bfloat16])
@pytest.mark.parametrize("model_type", MAKERS)
def test_what_is_made_again_is_the_same(
    model_type: str, rounding: torch.dtype | None, shares: list[bool]
) -> None:
    """The last linear's inputs of all batches are given up, beside one stream or two."""
    plenty = Holder(host_budget=2**62)
    _, want, outputs = run_again(model_type, plenty, rounding, shares, last=False)
    assert plenty.recomputed_share == 0 and plenty.kept_inputs > 0
    holder = Holder(host_budget=2**62, recompute_from=0)
    walk, arrivals, streams = run_again(model_type, holder, rounding, shares, last=False)
    assert holder.recomputed_share == 1
    # With two streams most is held before the last stop.
    assert holder.peak_bytes < plenty.peak_bytes or any(shares)
    for got, right in zip(arrivals, want, strict=True):
        assert torch.equal(got.h, right.h), got.names
        for sums in ("cross", "pull"):
            one, two = getattr(got, sums), getattr(right, sums)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two), (got.names, sums)
    for got_out, right_out in zip(streams, outputs, strict=True):
        assert torch.equal(got_out, right_out)
    assert not walk.solved, "every weight was given up in the end"
    assert all(linear_of(walk.block, n).weight.is_meta for group in walk.groups for n in group)


@pytest.mark.parametrize("apart", [False, True])
def test_only_some_inputs_are_made_again(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs in slabs, and of those large enough to stay where the forward put them."""
    monkeypatch.setattr("qquant.calibration.hold.SLAB", 2 * TOKENS * 96 * 4)  # one input
    if apart:
        monkeypatch.setattr("qquant.calibration.hold._APART", 2 * TOKENS * 96 * 4)
    _, _, want = run_again("qwen2", Holder(host_budget=2**62), None, [False] * 3, last=False)
    shares = set()
    for room in range(0, 12 * 2 * TOKENS * 96 * 4, 2 * TOKENS * 96 * 4):
        holder = Holder(host_budget=2**62, recompute_from=room)
        _, _, got = run_again("qwen2", holder, None, [False] * 3, last=False)
        shares.add(round(3 * holder.recomputed_share))
        assert holder._apart == 0, "all were given back"
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert {0, 3} < shares, "and some room is for some of them"


def test_the_last_block_makes_nothing_again() -> None:
    holder = Holder(host_budget=2**62, recompute_from=0)
    run_again("qwen3", holder, None, [True] * 3, last=True)
    assert holder.kept_inputs == holder.recomputed_inputs == 0


@pytest.mark.parametrize("model_type", MAKERS)
def test_the_path_from_the_residual_is_found(model_type: str) -> None:
    block, kwargs, linears, _ = MAKERS[model_type](model_type)
    hidden = batches()[0][:1]
    groups = shared_inputs(block, linears, hidden, kwargs)
    norm = "ln_2" if model_type == "qwen" else "post_attention_layernorm"
    found = recomputable(block, groups, hidden, kwargs)
    assert found == Recompute(norm, "mlp", LAST[model_type])


def test_an_input_that_does_not_follow_is_kept() -> None:
    """More than the residual goes in, here a count of calls; or two linears share it."""
    block, kwargs, linears, _ = native_block("qwen2")
    hidden = batches()[0][:1]
    groups = shared_inputs(block, linears, hidden, kwargs)
    inner, calls = block.mlp.forward, []

    def counting(x: Tensor) -> Tensor:
        calls.append(x)
        return inner(x + len(calls))

    block.mlp.forward = counting
    assert recomputable(block, groups, hidden, kwargs) is None
    assert len(calls) == 2, "it was tried"
    block.mlp.forward = inner
    assert recomputable(block, groups, hidden, kwargs) is not None
    assert recomputable(block, groups[:-1], hidden, kwargs) is None, "gate and up share theirs"
