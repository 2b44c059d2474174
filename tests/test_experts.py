"""Mixtures of experts: split as in files, walked one expert at a time, each by its own tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qquant.calibration.experts import Places
from qquant.calibration.hold import Holder
from qquant.calibration.probe import droppable, shared_inputs
from qquant.calibration.walk import Arrival, BlockWalk, stages_of
from qquant.hessian import Hessian
from qquant.models.experts import routed, split_experts
from qquant.models.families import FAMILIES
from qquant.products import in_float32

KINDS = ("qwen2_moe", "qwen3_moe")
HIDDEN, TOKENS, BATCHES, EXPERTS = 64, 24, 3, 6


def tiny(kind: str, **changes: Any) -> Any:
    """A random float32 mixture of transformers' own, experts fused."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def apart(model: Any, kind: str, *, visit_all: bool = False) -> Any:
    """The model with its experts split and their weights in place."""
    fused = {k: v.clone() for k, v in model.state_dict().items() if ".experts." in k}
    split_experts(model, FAMILIES[kind], visit_all=visit_all)
    state = {}
    for name, tensor in fused.items():
        stem, _, leaf = name.rpartition(".")
        for e, part in enumerate(tensor):
            if leaf == "down_proj":
                state[f"{stem}.{e}.down_proj.weight"] = part
            else:
                gate, up = part.chunk(2)
                state |= {f"{stem}.{e}.gate_proj.weight": gate, f"{stem}.{e}.up_proj.weight": up}
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and not any("experts" in k for k in left.missing_keys)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_split_experts_compute_what_transformers_does(
    kind: str, norm: bool, implementation: str
) -> None:
    model = tiny(kind, norm_topk_prob=norm)
    model.config._experts_implementation = implementation
    ids = torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        for visit_all in (False, True):
            got = apart(tiny(kind, norm_topk_prob=norm), kind, visit_all=visit_all)(ids).logits
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_routes_are_in_the_order_of_ranks_then_tokens() -> None:
    index = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    found = [(t.tolist(), r.tolist()) for t, r in routed(index, 4)]
    assert found == [
        ([1, 3, 0], [0, 0, 1]),
        ([1, 2], [1, 1]),
        ([0, 2, 3], [0, 0, 1]),
        ([], []),
    ]


@dataclass
class Case:
    """One block, what it takes, and its linears."""

    block: nn.Module
    kwargs: Mapping[str, Any]
    linears: list[str]


LINEAR = {
    "layer_types": ["linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FULL = LINEAR | {"layer_types": ["full_attention"]}
# Every kind of block that `test_walk` has not: with experts, with linear attention, with both.
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_next-linear": ("qwen3_next", LINEAR),
    "qwen3_next-full": ("qwen3_next", FULL),
    "qwen3_5-linear": ("qwen3_5_text", LINEAR),
    "qwen3_5-full": ("qwen3_5_text", FULL),
    "qwen3_5_moe-linear": ("qwen3_5_moe_text", LINEAR),
}


def case(name: str, starve: bool = False) -> Case:
    """A block with split experts; with `starve`, the router never chooses the last expert."""
    kind, changes = BLOCKS[name]
    model = apart(tiny(kind, **changes), kind, visit_all=True)
    body = model.model
    positions = torch.arange(TOKENS)[None]
    try:
        rotary = body.rotary_emb(torch.zeros(1, TOKENS, HIDDEN), positions)
    except IndexError:  # an older transformers wants Qwen3.5's for each of an image's axes
        rotary = body.rotary_emb(torch.zeros(1, TOKENS, HIDDEN), positions.expand(3, 1, -1))
    kwargs = {
        "attention_mask": None,
        "position_embeddings": rotary,
        "position_ids": positions,
        "past_key_values": None,
    }
    block = body.layers[0].requires_grad_(False)
    if starve:
        block.mlp.gate.weight[-1] = 0  # never above the largest two of the others
        block.mlp.gate.weight[0] = -block.mlp.gate.weight[1]
        block.mlp.gate.weight[2] = -block.mlp.gate.weight[3]
    family = FAMILIES[kind]
    names = [f"model.layers.0.{n}" for n, _ in block.named_parameters()]
    return Case(block, kwargs, list(family.by_block(names)[0]))


def coarse(w: Tensor) -> Tensor:
    return (w * 30).round() / 30


def batches(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, TOKENS, HIDDEN, generator=generator) for _ in range(BATCHES)]


def rounding_hooks(made: Case, dtype: torch.dtype) -> list[Any]:
    """What the walk rounds, rounded by hooks: norms' inputs and outputs, every linear's input."""

    def in_place(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].copy_(args[0].to(dtype))

    def cast(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].to(dtype).to(args[0].dtype),)

    def after(_m: nn.Module, _i: object, out: Tensor) -> None:
        out.copy_(out.to(dtype))  # what is handed to linears is rounded for all that get it

    block = made.block
    norms = [c for c in block.children() if isinstance(getattr(c, "weight", None), Tensor)]
    hooks = [n.register_forward_pre_hook(in_place) for n in norms]
    hooks += [n.register_forward_hook(after) for n in norms]
    return hooks + [block.get_submodule(n).register_forward_pre_hook(cast) for n in made.linears]


def replay(
    made: Case, groups: list[tuple[str, ...]], hidden: list[Tensor], rounding: torch.dtype | None
) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """The slow way: a whole forward of every batch for each group, then one for the outputs."""
    block, hooks = made.block, []
    if rounding is not None:
        hooks = rounding_hooks(made, rounding)
        hidden = [h.to(rounding).to(h.dtype) for h in hidden]
    hessians, counts = [], []
    with torch.no_grad():
        for group in groups:
            linear = block.get_submodule(group[0])
            rows: list[Tensor] = []
            hook = linear.register_forward_pre_hook(lambda m, a, rows=rows: rows.append(a[0]))
            for h in hidden:
                block(h.clone(), **made.kwargs)
            hook.remove()
            stats = Hessian(linear.weight.shape[1])
            if ".experts." in group[0]:
                stats.add(torch.cat(rows))
            else:
                for x in rows:
                    stats.add(x)
            counts.append(stats.tokens)
            hessians.append(stats.result()[0])
            for name in group:
                weight = block.get_submodule(name).weight
                weight.copy_(coarse(weight))
        outputs = [block(h.clone(), **made.kwargs) for h in hidden]
        if rounding is not None:
            outputs = [h.to(rounding) for h in outputs]
    for hook in hooks:
        hook.remove()
    return hessians, counts, outputs


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("rounding", [None, torch.bfloat16])
def test_equals_naive_replay_bit_for_bit(
    kind: str, rounding: torch.dtype | None, tmp_path: Path
) -> None:
    hidden = batches()
    made = case(kind)
    groups = shared_inputs(made.block, made.linears, hidden[0][:1], made.kwargs)
    weights = {n: made.block.get_submodule(n).weight.clone() for n in made.linears}
    drops = droppable(made.block, groups, hidden[0][:1, :16], short(made))
    hessians, counts, outputs = replay(case(kind), groups, hidden, rounding)
    for holder in (None, Holder(host_budget=0, spill_dir=tmp_path)):
        arrivals: list[Arrival] = []

        def solve(arrival: Arrival, arrivals: list[Arrival] = arrivals) -> dict[str, Tensor]:
            arrivals.append(arrival)
            return {n: coarse(weights[n]) for n in arrival.names}

        stream = [h.clone() if rounding is None else h.to(rounding) for h in hidden]
        walk = BlockWalk(
            case(kind).block,
            groups,
            holder=holder,
            hold_dtype=rounding,
            drops=drops,
            expert_tokens=0,
        )
        walk.run([stream], [made.kwargs] * BATCHES, solve)
        assert [a.names for a in arrivals] == groups
        for arrival, h, count in zip(arrivals, hessians, counts, strict=True):
            assert arrival.tokens == count and not arrival.flags
            assert torch.equal(arrival.h, h), arrival.names
        for got, want in zip(stream, outputs, strict=True):
            assert torch.equal(got, want)
        if holder is not None:
            assert holder.spilled_bytes > 0 and not any(holder._used.values())


def short(made: Case) -> dict[str, Any]:
    cos, sin = made.kwargs["position_embeddings"]
    return {**made.kwargs, "position_embeddings": (cos[:, :16], sin[:, :16])}


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_are_one_stop_and_reveal_themselves_without_tokens(kind: str) -> None:
    """Six experts, two tokens: most are not routed to, and the groups are the same."""
    made = case(kind)
    two = {
        **made.kwargs,
        "position_embeddings": tuple(t[:, :2] for t in short(made)["position_embeddings"]),
    }
    few = shared_inputs(made.block, made.linears, batches()[0][:1, :2], two)
    assert few == shared_inputs(made.block, made.linears, batches()[0][:1], made.kwargs)
    experts = [g for g in few if ".experts." in g[0]]
    assert experts == [
        group
        for e in range(EXPERTS)
        for group in (
            (f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj"),
            (f"mlp.experts.{e}.down_proj",),
        )
    ]
    stages = stages_of(made.block, few)
    assert [s.experts is not None for s in stages].count(True) == 1
    assert stages[-1].names == tuple(n for g in experts for n in g)
    assert sum((s.names for s in stages), ()) == sum(few, ())


@dataclass
class Ran:
    """What a walk handed to the solver, by the first linear's name, and its streams' outputs."""

    arrivals: dict[str, Arrival]
    streams: list[list[Tensor]]


def walked(made: Case, streams: list[list[Tensor]], share: float, **more: Any) -> Ran:
    groups = shared_inputs(made.block, made.linears, batches()[0][:1], made.kwargs)
    weights = {n: made.block.get_submodule(n).weight.clone() for n in made.linears}
    arrivals: dict[str, Arrival] = {}

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals[arrival.names[0]] = arrival
        return {n: coarse(weights[n]) for n in arrival.names}

    walk = BlockWalk(made.block, groups, expert_tokens=share, **more)
    walk.run(streams, [made.kwargs] * len(streams[0]), solve)
    return Ran(arrivals, streams)


def test_an_expert_with_few_tokens_is_named_and_given_others() -> None:
    """The last expert gets none: it is solved on evenly spread tokens of the others."""
    made = case("qwen3_moe", starve=True)
    least = HIDDEN // 2
    found = walked(made, [batches()], 0.5).arrivals
    own = {n: a.tokens for n, a in walked(case("qwen3_moe", True), [batches()], 0).arrivals.items()}
    gates = [f"mlp.experts.{e}.gate_proj" for e in range(EXPERTS)]
    assert own[gates[-1]] == 0 < own[gates[0]]
    assert sum(own[g] for g in gates) == 2 * 2 * TOKENS * BATCHES
    for e, gate in enumerate(gates):
        for name in (gate, f"mlp.experts.{e}.down_proj"):
            few = own[gate] < least
            assert found[name].flags == ((f"few-tokens:{own[gate]}",) if few else ())
            assert found[name].tokens == max(own[gate], least)
    # All tokens, where more are asked for than there are; then its input is that of the layer.
    whole = walked(case("qwen3_moe", starve=True), [batches()], 1000).arrivals
    first = whole[gates[-1]]
    assert first.tokens == 2 * TOKENS * BATCHES
    for gate in gates:
        torch.testing.assert_close(whole[gate].h, first.h, atol=1e-5, rtol=1e-5)
    # Evenly spread: the third of all tokens has nearly the mean of all of them.
    third = walked(case("qwen3_moe", starve=True), [batches()], 48 / HIDDEN).arrivals[gates[-1]]
    assert third.tokens == 48
    assert abs(float(third.h.trace() / first.h.trace()) - 1) < 0.1


def test_few_tokens_change_nothing_of_the_outputs_rows() -> None:
    """The output is of the routed tokens only, whatever an expert was solved on."""
    plain = walked(case("qwen2_moe"), [batches()], 0).streams[0]
    helped = walked(case("qwen2_moe"), [batches()], 1000).streams[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, helped, strict=True))


def test_corrections_are_of_the_tokens_that_both_streams_send() -> None:
    quantized, full = batches(), [h + 0.05 * torch.randn(h.shape) for h in batches()]
    made, inputs = case("qwen3_moe"), {}
    changed = case("qwen3_moe")
    with torch.no_grad():
        for n in changed.linears[:4]:  # attention is solved before
            weight = changed.block.get_submodule(n).weight
            weight.copy_(coarse(weight))
        for which, block, hidden in (("q", changed.block, quantized), ("f", made.block, full)):
            for part in (block.mlp.experts,):
                part.register_forward_pre_hook(
                    lambda m, a, which=which: inputs.setdefault(which, []).append(a)
                )
            for h in hidden:
                block(h, **made.kwargs)
    found = walked(
        case("qwen3_moe"),
        [list(quantized), [full[0], full[1][:0], full[2]]],
        0.1,
    )
    paired = []
    for e in range(EXPERTS):
        arrival = found.arrivals[f"mlp.experts.{e}.gate_proj"]
        xs, diffs = [], []
        for b, (q, f) in enumerate(zip(inputs["q"], inputs["f"], strict=True)):
            mine = (q[1] == e).any(1)
            both = mine & (f[1] == e).any(1)
            if b != 1:
                xs.append(q[0][both])
                diffs.append(f[0][both] - q[0][both])
        x, d = torch.cat(xs), torch.cat(diffs)
        paired.append(x.shape[0])
        assert arrival.cross is not None and arrival.pull is None
        torch.testing.assert_close(arrival.cross, 2 / x.shape[0] * d.T @ x, atol=1e-5, rtol=1e-4)
        assert found.arrivals[f"mlp.experts.{e}.down_proj"].cross is not None
    assert min(paired) > 0.1 * HIDDEN
    # The full-precision stream comes out as the block itself, by its own routes.
    fresh = case("qwen3_moe").block
    with torch.no_grad():
        for b in (0, 2):
            want = fresh(full[b], **made.kwargs)
            torch.testing.assert_close(found.streams[1][b], want, atol=1e-5, rtol=1e-5)
    assert not found.streams[1][1].numel()
    # Fewer than asked for of both streams, and enough of its own: no correction, by name.
    least = sorted(paired)[EXPERTS // 2]
    streams = [list(quantized), [full[0], full[1][:0], full[2]]]
    some = walked(case("qwen3_moe"), streams, least / HIDDEN).arrivals
    for e, count in enumerate(paired):
        arrival = some[f"mlp.experts.{e}.gate_proj"]
        assert (arrival.cross is not None) == (count >= least)
        assert arrival.flags == (() if count >= least else ("correction-skipped",))
        assert some[f"mlp.experts.{e}.down_proj"].flags == arrival.flags
    assert min(paired) < least


def test_equal_streams_give_an_exactly_zero_correction() -> None:
    made = case("qwen2_moe")
    groups = shared_inputs(made.block, made.linears, batches()[0][:1], made.kwargs)
    same = {n: made.block.get_submodule(n).weight.clone() for n in made.linears}
    arrivals: list[Arrival] = []

    def solve(arrival: Arrival) -> dict[str, Tensor]:
        arrivals.append(arrival)
        return {n: same[n] for n in arrival.names}

    BlockWalk(made.block, groups, expert_tokens=0).run(
        [batches(), batches()], [made.kwargs] * BATCHES, solve
    )
    assert len(arrivals) == len(groups)
    for arrival in arrivals:
        sums = [t for t in (arrival.cross, arrival.pull) if t is not None]
        assert sums and not any(t.any() for t in sums)


class Shared:
    """The sums of several walks, each in a thread of its own; they have to ask for the same."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.asked: list[Sequence[Tensor]] = [()] * size

    def of(self, number: int) -> Callable[[Sequence[Tensor]], None]:
        def add_up(parts: Sequence[Tensor]) -> None:
            self.asked[number] = parts
            self.barrier.wait()
            sums = [sum(each[1:], each[0].clone()) for each in zip(*self.asked, strict=True)]
            self.barrier.wait()
            for part, total in zip(parts, sums, strict=True):
                assert part.shape == total.shape
                part.copy_(total)

        return add_up


@pytest.mark.parametrize("share", [7 / HIDDEN, 41 / HIDDEN, 1000])
@pytest.mark.parametrize("parts", [[[0, 2], [1]], [[1], [0], [2], []]], ids=["two", "four"])
def test_several_walks_find_what_one_finds(share: float, parts: list[list[int]]) -> None:
    """Each with its own batches, or none: the same counts, helpers and corrections.

    Weights are rounded without looking at the Hessian here, so every batch's own numbers are those
    of the one walk: what is left is the order of the sums, of 144 rows at the most.
    """

    def both_streams() -> list[list[Tensor]]:
        quantized, noise = batches(), batches(seed=2)
        full = [h + 0.05 * n for h, n in zip(quantized, noise, strict=True)]
        return [quantized, [full[0], full[1][:0], full[2]]]

    with in_float32():  # all threads from beginning to end: the same library for all sums
        one = walked(case("qwen2_moe", starve=True), both_streams(), share)
    shared = Shared(len(parts))
    cases = [(case("qwen2_moe", starve=True), both_streams()) for _ in parts]

    def walk(number: int) -> Ran:
        made, streams = cases[number]
        mine = [[stream[b] for b in parts[number]] for stream in streams]
        places = Places([2 * b for b in parts[number]], 2 * BATCHES)
        return walked(made, mine, share, add_up=shared.of(number), places=places)

    with in_float32(), ThreadPoolExecutor(len(parts)) as pool:
        several = list(pool.map(walk, range(len(parts))))
    experts = [a for name, a in one.arrivals.items() if ".experts." in name]
    assert any(a.flags for a in experts)
    assert any(a.cross is not None for a in experts) == (share < 1)
    for part, found in zip(parts, several, strict=True):
        assert list(found.arrivals) == list(one.arrivals)
        for name, want in one.arrivals.items():
            got = found.arrivals[name]
            assert (got.names, got.tokens, got.flags) == (want.names, want.tokens, want.flags)
            torch.testing.assert_close(got.h, want.h, atol=1e-6, rtol=1e-5)
            assert (got.cross is None) == (want.cross is None), name
            if want.cross is not None:
                torch.testing.assert_close(got.cross, want.cross, atol=1e-6, rtol=1e-5)
            assert torch.equal(got.h, several[0].arrivals[name].h)
        for stream, expected in zip(found.streams, one.streams, strict=True):
            assert all(torch.equal(stream[i], expected[b]) for i, b in enumerate(part))


def test_the_last_block_adds_nothing_up() -> None:
    made = case("qwen3_moe")
    assert not any(h.numel() for s in walked_last(made) for h in s)


def walked_last(made: Case) -> list[list[Tensor]]:
    groups = shared_inputs(made.block, made.linears, batches()[0][:1], made.kwargs)
    weights = {n: made.block.get_submodule(n).weight.clone() for n in made.linears}
    downs: list[int] = []
    for expert in made.block.mlp.experts:
        expert.down_proj.register_forward_hook(lambda *_: downs.append(1))
    streams = [batches(), batches()]
    BlockWalk(made.block, groups).run(
        streams, [made.kwargs] * BATCHES, lambda a: {n: weights[n] for n in a.names}, last=True
    )
    assert not downs
    return streams
