"""The walk: bit for bit a naive replay, one forward per block, two streams in lockstep."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qquant import products
from qquant.calibration import walk as calibration_walk
from qquant.calibration.batch import Batch
from qquant.calibration.hold import Holder
from qquant.calibration.probe import droppable, shared_inputs
from qquant.calibration.walk import Arrival, BlockWalk, linear_of
from qquant.errors import RunError
from qquant.hessian import Hessian
from qquant.products import linear

HIDDEN, TOKENS, BATCHES = 64, 24, 3


def native_block(model_type: str) -> tuple[nn.Module, dict[str, Any], list[str], frozenset[str]]:
    """A random decoder block of transformers' own, what it takes, and its linears."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=32,
    )
    body = AutoModelForCausalLM.from_config(config).eval().model
    positions = torch.arange(TOKENS)[None]
    kwargs = {
        "attention_mask": None,
        "position_embeddings": body.rotary_emb(torch.zeros(1, TOKENS, HIDDEN), positions),
        "position_ids": positions,
        "past_key_values": None,
    }
    attention = [f"self_attn.{n}_proj" for n in "qkvo"]
    linears = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return body.layers[0], kwargs, linears, frozenset({"self_attn.o_proj", "mlp.down_proj"})


def original_block(_: str) -> tuple[nn.Module, dict[str, Any], list[str], frozenset[str]]:
    """The same of original Qwen, with what our model passes to it."""
    from qquant.models.qwen.configuration_qwen import QWenConfig
    from qquant.models.qwen.modeling_qwen import QWenLMHeadModel

    torch.manual_seed(0)
    config = QWenConfig(
        hidden_size=HIDDEN,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        kv_channels=16,
        vocab_size=32,
        seq_length=64,
    )
    body = QWenLMHeadModel(config).eval().transformer
    seen: dict[str, Any] = {}
    hook = body.h[0].register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    with torch.no_grad():
        body(inputs_embeds=torch.zeros(1, TOKENS, HIDDEN), use_cache=False)
    hook.remove()
    seen.pop("hidden_states", None)
    linears = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
    return body.h[0], seen, linears, frozenset({"attn.c_proj", "mlp.c_proj"})


MAKERS = {"qwen": original_block, "qwen2": native_block, "qwen3": native_block}


def coarse(w: Tensor) -> Tensor:
    """A stand-in for quantization that changes weights visibly."""
    return (w * 30).round() / 30


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, TOKENS, HIDDEN, generator=generator) for _ in range(BATCHES)]


def replay(
    block: nn.Module,
    groups: list[tuple[str, ...]],
    kwargs: Mapping[str, Any],
    hidden: list[Tensor],
    rounding: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The slow way: one whole forward of every batch per group, then one more for the outputs."""
    hessians = []
    hooks = []
    linears = [block.get_submodule(name) for group in groups for name in group]
    for m in linears:  # by the library that the walk multiplies with
        m.__dict__["forward"] = lambda x, m=m: linear(x, m.weight, m.bias)
    if rounding is not None:
        norms = [c for c in block.children() if isinstance(getattr(c, "weight", None), Tensor)]

        def in_place(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].copy_(args[0].to(rounding))  # the residual addition sees it rounded, too

        hooks += [n.register_forward_pre_hook(in_place) for n in norms]
        hooks += [
            m.register_forward_pre_hook(lambda m, a: (a[0].to(rounding).to(a[0].dtype),))
            for m in linears
        ]
        hidden = [h.to(rounding).to(h.dtype) for h in hidden]
    with torch.no_grad():
        for group in groups:
            leader = block.get_submodule(group[0])
            stats = Hessian(leader.weight.shape[1])
            hook = leader.register_forward_pre_hook(lambda m, a, stats=stats: stats.add(a[0]))
            for h in hidden:
                block(h, **kwargs)
            hook.remove()
            hessians.append(stats.result()[0])
            for name in group:
                weight = block.get_submodule(name).weight
                weight.copy_(coarse(weight))
        outputs = [block(h, **kwargs) for h in hidden]
        if rounding is not None:
            outputs = [h.to(rounding) for h in outputs]
    for hook in hooks:
        hook.remove()
    return hessians, outputs


@pytest.mark.parametrize("model_type", MAKERS)
@pytest.mark.parametrize("rounding", [None, torch.bfloat16])
def test_equals_naive_replay_bit_for_bit(
    model_type: str, rounding: torch.dtype | None, tmp_path: Path
) -> None:
    block, kwargs, linears, _ = MAKERS[model_type](model_type)
    hidden = batches()
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)
    weights = {n: block.get_submodule(n).weight.detach().clone() for n in linears}

    drops = droppable(block, groups, hidden[0][:1], kwargs)
    for holder in (None, Holder(host_budget=0, spill_dir=tmp_path)):
        block, kwargs, _, _ = MAKERS[model_type](model_type)
        arrivals: list[Arrival] = []

        def solve(arrival: Arrival, arrivals: list[Arrival] = arrivals) -> dict[str, Tensor]:
            arrivals.append(arrival)
            return {n: coarse(weights[n]) for n in arrival.names}

        stream = [h.clone() if rounding is None else h.to(rounding) for h in hidden]
        walk = BlockWalk(block, groups, holder=holder, hold_dtype=rounding, drops=drops)
        walk.run([stream], [kwargs] * BATCHES, solve)

        reference, _, _, _ = MAKERS[model_type](model_type)
        hessians, outputs = replay(reference, groups, kwargs, hidden, rounding)
        assert [a.names for a in arrivals] == groups
        for arrival, h in zip(arrivals, hessians, strict=True):
            assert torch.equal(arrival.h, h), arrival.names
            assert arrival.tokens == 2 * TOKENS * BATCHES
        for got, want in zip(stream, outputs, strict=True):
            assert torch.equal(got, want)
        if holder is not None:
            assert holder.spilled_bytes > 0
            assert not list(tmp_path.iterdir()), "spill files are unlinked"


def test_groups_reveal_themselves() -> None:
    block, kwargs, linears, _ = native_block("qwen2")
    assert shared_inputs(block, linears, batches()[0][:1], kwargs) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    block, kwargs, linears, _ = original_block("qwen")
    groups = shared_inputs(block, linears, batches()[0][:1], kwargs)
    assert [sorted(g) for g in groups] == [
        ["attn.c_attn"],
        ["attn.c_proj"],
        ["mlp.w1", "mlp.w2"],
        ["mlp.c_proj"],
    ]


@pytest.mark.parametrize("model_type", MAKERS)
def test_dead_locals_are_found_and_live_ones_kept(model_type: str) -> None:
    block, kwargs, linears, _ = MAKERS[model_type](model_type)
    hidden = batches()[0][:1]
    groups = shared_inputs(block, linears, hidden, kwargs)
    drops = droppable(block, groups, hidden, kwargs)
    names = [{name for _, name in drops[i]} for i in range(len(groups))]
    assert (-1, "input") in drops[2], "the block's input is dead once attention was added to it"
    assert (-1, "input") not in drops[0] | drops[1], "and is the residual before"
    assert len(names[1]) >= 3, "queries, keys and values are dead at the output projection"

    # A tensor that is needed later is kept however it is named.
    original = block.mlp.forward
    block.mlp.forward = lambda x, *args: original(x, *args) + x  # reads its input once more
    drops = droppable(block, groups, hidden, kwargs)
    assert not any(name == "x" for depth, name in drops[3] if depth > 1)
    outputs = []
    for d in ({}, drops):
        stream = [h.clone() for h in batches()]
        weights = {n: block.get_submodule(n).weight.detach() for n in linears}
        fresh, _, _, _ = MAKERS[model_type](model_type)
        inner = fresh.mlp.forward
        fresh.mlp.forward = lambda x, *args, inner=inner: inner(x, *args) + x
        BlockWalk(fresh, groups, drops=d).run(
            [stream], [kwargs] * BATCHES, lambda a, w=weights: {n: w[n] for n in a.names}
        )
        outputs.append(stream)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_linear_that_never_runs_is_refused() -> None:
    block, kwargs, linears, _ = native_block("qwen2")
    block.mlp.spare = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(RunError, match=r"mlp\.spare"):
        shared_inputs(block, [*linears, "mlp.spare"], batches()[0][:1], kwargs)


@pytest.mark.parametrize("streams", [1, 2])
def test_at_most_1_1_forwards_per_block_and_stream(
    streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in matmul FLOPs, without the Hessians' own and beside the one-sequence probe."""
    monkeypatch.setattr(Hessian, "add", lambda *_: None)
    block, kwargs, linears, residual = native_block("qwen2")
    hidden = batches()
    count = {"custom_mapping": {torch.ops.mkldnn._linear_pointwise: linear_flops}}
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        for h in hidden:
            block(h, **kwargs)
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        return {n: coarse(block.get_submodule(n).weight) for n in arrival.names}

    walk = BlockWalk(block, groups, residual=residual)
    with FlopCounterMode(display=False, **count) as whole:
        walk.run([list(hidden) for _ in range(streams)], [kwargs] * BATCHES, solve)
    forwards = whole.get_total_flops() / once.get_total_flops()
    assert streams <= forwards <= 1.1 * streams


def linear_flops(x: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    """Of oneDNN's linear, which torch's counter does not know: by the operands' shapes."""
    return 2 * prod(x) * weight[0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_two_streams_in_lockstep(share: float) -> None:
    """The full stream ends as the unquantized block; the differences are those of a direct sum."""
    block, kwargs, linears, residual = native_block("qwen3")
    quantized, full = batches(), [h + 0.01 for h in batches()]
    groups = shared_inputs(block, linears, full[0][:1], kwargs)
    with torch.no_grad():
        want_full = [block(h, **kwargs) for h in full]

    inputs: dict[str, list[Tensor]] = {}
    hooks = [
        block.get_submodule(g[0]).register_forward_pre_hook(
            lambda m, a, n=g[0]: inputs.setdefault(n, []).append(a[0])
        )
        for g in groups
    ]
    residuals: list[Tensor] = []
    norm = block.post_attention_layernorm.register_forward_pre_hook(
        lambda m, a: residuals.append(a[0])
    )
    changed, _, _, _ = native_block("qwen3")
    with torch.no_grad():
        for h in full:
            block(h, **kwargs)
        full_inputs = {n: torch.cat(v).reshape(-1, v[0].shape[-1]) for n, v in inputs.items()}
        full_residual = torch.cat(residuals).reshape(-1, HIDDEN)
    for hook in [*hooks, norm]:
        hook.remove()

    streams = [list(quantized), list(full)]
    arrivals: list[Arrival] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals.append(arrival)
        return {n: coarse(changed.get_submodule(n).weight.detach()) for n in arrival.names}

    down = block.mlp.down_proj.weight.detach().clone()
    walk = BlockWalk(block, groups, residual=residual, residual_share=share)
    walk.run(streams, [kwargs] * BATCHES, solve)
    for got, want in zip(streams[1], want_full, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)

    # The quantized stream by replay, to have its inputs to the last linear.
    with torch.no_grad():
        for n in linears:
            weight = changed.get_submodule(n).weight
            weight.copy_(coarse(weight))
        seen: list[Tensor] = []
        mid: list[Tensor] = []
        begun: list[Tensor] = []
        changed.get_submodule(linears[0]).register_forward_pre_hook(lambda m, a: begun.append(a[0]))
        changed.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        changed.post_attention_layernorm.register_forward_pre_hook(lambda m, a: mid.append(a[0]))
        for h in quantized:
            changed(h, **kwargs)
    x = torch.cat(seen).reshape(-1, 96)
    quantized_inputs = torch.cat(begun).reshape(-1, HIDDEN)
    last = arrivals[-1]
    assert last.names == ("mlp.down_proj",)
    total = last.pull
    assert total is not None and last.cross is None, "by the outputs, which are there anyway"
    inward = (full_inputs["mlp.down_proj"] - x) @ down.T
    behind = full_residual - torch.cat(mid).reshape(-1, HIDDEN)
    n = x.shape[0]
    torch.testing.assert_close(total, 2 / n * (inward + share * behind).T @ x, atol=1e-6, rtol=1e-4)
    first = full_inputs[linears[0]] - quantized_inputs
    assert arrivals[0].cross is not None
    torch.testing.assert_close(
        arrivals[0].cross, 2 / n * first.T @ quantized_inputs, atol=1e-6, rtol=1e-4
    )
    assert arrivals[0].pull is None, "q/k/v do not write to the residual stream"


@pytest.mark.parametrize("model_type", MAKERS)
def test_packed_weights_change_no_bit(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, where a processor multiplies it: both streams, every linear."""
    found: dict[bool, tuple[list[Arrival], list[list[Tensor]]]] = {}
    packed: list[tuple[int, ...]] = []

    def packing(weight: Tensor, int16: bool) -> Tensor:
        assert not int16
        packed.append(tuple(weight.shape))
        return products.packed(weight)

    for packs in (False, True):
        monkeypatch.setattr(calibration_walk, "packed", packing if packs else lambda w, _: w)
        block, kwargs, linears, residual = MAKERS[model_type](model_type)
        block = block.bfloat16()
        own = {k: _narrow(v) for k, v in kwargs.items()}
        streams = [[(h + d).bfloat16() for h in batches()] for d in (0.0, 0.01)]
        groups = shared_inputs(block, linears, streams[0][0][:1], own)
        weights = {n: block.get_submodule(n).weight.detach().clone() for n in linears}
        arrivals: list[Arrival] = []

        def solve(arrival: Arrival, to: Any = arrivals, of: Any = weights) -> dict[str, Tensor]:
            to.append(arrival)
            return {n: coarse(of[n]) for n in arrival.names}

        walk = BlockWalk(block, groups, residual=residual, hold_dtype=torch.bfloat16)
        walk.run(streams, [own] * BATCHES, solve)
        found[packs] = arrivals, streams
    assert sorted(packed) == sorted(2 * [tuple(w.shape) for w in weights.values()])
    for one, two in zip(*(arrivals for arrivals, _ in found.values()), strict=True):
        assert torch.equal(one.h, two.h)
        assert one.pull is None or torch.equal(one.pull, two.pull)
    plain, laid = ([h for stream in streams for h in stream] for _, streams in found.values())
    for one, two in zip(plain, laid, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, two)


def _narrow(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_narrow(v) for v in value)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value


def test_equal_streams_give_an_exactly_zero_correction() -> None:
    block, kwargs, linears, residual = native_block("qwen2")
    hidden = batches()
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)
    same = {n: block.get_submodule(n).weight.detach().clone() for n in linears}
    arrivals: list[Arrival] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals.append(arrival)
        return {n: same[n] for n in arrival.names}

    BlockWalk(block, groups, residual=residual).run(
        [list(hidden), list(hidden)], [kwargs] * BATCHES, solve
    )
    for arrival in arrivals:
        sums = [t for t in (arrival.cross, arrival.pull) if t is not None]
        assert sums and not any(t.any() for t in sums)


def run_two(full: list[bool], *, last: bool = False) -> tuple[list[Arrival], list[list[Tensor]]]:
    """Two streams through a Qwen2 block, the full-precision one only where `full` says so."""
    block, kwargs, linears, residual = native_block("qwen2")
    hidden = batches()
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)
    arrivals: list[Arrival] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals.append(arrival)
        return {n: coarse(block.get_submodule(n).weight.detach()) for n in arrival.names}

    streams = [
        [h.clone() for h in hidden],
        [h + 0.01 if f else h[:0] for h, f in zip(hidden, full, strict=True)],
    ]
    BlockWalk(block, groups, residual=residual).run(streams, [kwargs] * 3, solve, last=last)
    return arrivals, streams


def test_a_full_precision_stream_through_some_batches() -> None:
    """H is of all batches; the corrections are means over the batches that run twice."""
    every, _ = run_two([True, True, True])
    some, streams = run_two([True, False, True])
    assert [h.numel() > 0 for h in streams[1]] == [True, False, True]
    alone = [run_two([i == j for j in range(3)])[0] for i in range(3)]
    for g, arrival in enumerate(some):
        assert torch.equal(arrival.h, every[g].h)
        for kind in ("cross", "pull"):
            want = getattr(alone[0][g], kind)
            if want is None:
                assert getattr(arrival, kind) is None
                continue
            want = (want + getattr(alone[2][g], kind)) / 2
            torch.testing.assert_close(getattr(arrival, kind), want, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(getattr(every[g], kind), want, rtol=1e-2, atol=1e-6)


def test_a_finished_batch_keeps_nothing() -> None:
    """At the last solve the full-precision stream is done: of its insides nothing is alive."""
    block, kwargs, linears, residual = original_block("")
    hidden = batches()
    groups = shared_inputs(block, linears, hidden[0][:1], kwargs)
    inside: list[Tensor] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        if arrival.names == groups[-1]:
            shape = (*hidden[0].shape[:2], arrival.h.shape[0])
            alive = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
            inside.extend(t for t in alive if t.shape == shape)
        return {n: coarse(block.get_submodule(n).weight.detach()) for n in arrival.names}

    drops = droppable(block, groups, hidden[0][:1], kwargs)
    streams = [[h.clone() for h in hidden] for _ in range(2)]
    BlockWalk(block, groups, residual=residual, drops=drops).run(streams, [kwargs] * 3, solve)
    assert len(inside) == BATCHES  # the quantized stream's inputs of the last linear


def test_the_last_block_stops_at_its_last_input() -> None:
    whole, outputs = run_two([True, True, True])
    short, nothing = run_two([True, True, True], last=True)
    for a, b in zip(whole, short, strict=True):
        assert torch.equal(a.h, b.h)
        assert (a.cross is None) == (b.cross is None)
    assert all(h.numel() for stream in outputs for h in stream)
    assert not any(h.numel() for stream in nothing for h in stream)


def test_the_last_block_keeps_no_stopped_batch() -> None:
    """A greenlet that nobody resumes keeps itself, its frames and all their tensors alive."""

    def stopped() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if issubclass(type(o), greenlet)]
        return sum(bool(o) and o.parent is not None for o in found)  # the main one has no parent

    run_two([True, True, True], last=True)
    assert stopped() == 0


@pytest.mark.parametrize("last", [False, True])
def test_the_last_block_gives_up_each_batch_at_its_last_input(
    last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits there is what memory would be needed for most."""
    made: list[weakref.ref[Batch]] = []
    alive: list[int] = []
    init, add = Batch.__init__, Hessian.add

    def counted(batch: Batch, *args: Any) -> None:
        made.append(weakref.ref(batch))
        init(batch, *args)

    def counting(stats: Hessian, *args: Any) -> None:
        alive.append(sum(ref() is not None for ref in made))
        add(stats, *args)

    monkeypatch.setattr(Batch, "__init__", counted)
    monkeypatch.setattr(Hessian, "add", counting)
    run_two([True, True, True], last=last)
    assert len(made) == 6 and len(alive) == 3 * 4
    assert alive[:9] == [6] * 9
    assert alive[9:] == ([6, 4, 2] if last else [6, 6, 6])


def test_free_heap_is_kept_by_the_largest_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(calibration_walk, "heap_slack", lambda largest: asked.append(largest) or 0)
    block, kwargs, names, _ = native_block("qwen2")
    groups = shared_inputs(block, names, batches()[0], kwargs)
    walk = BlockWalk(block, groups)
    small, large = torch.randn(1, TOKENS, HIDDEN), torch.randn(3, TOKENS, HIDDEN)
    solve = {n: coarse(linear_of(block, n).weight.detach()) for n in names}
    walk.run([[small, large]], [kwargs] * 2, lambda arrival: {n: solve[n] for n in arrival.names})
    assert asked == [3 * TOKENS * 96 * 4]  # float32 of the MLP's width
