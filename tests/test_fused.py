"""Norms, gates and softmax in machine code: right, taken where they are made for, else torch's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handmade
import pytest
import torch
from test_runtime import needs_avx2
from torch import Tensor, nn
from torch.nn import functional as F

from qquant import CalibrationSpec, QuantSpec, fused, fused_ir, llvm_code, llvm_ir, quantize
from qquant.errors import RunError
from qquant.models import fused_blocks
from qquant.models.qwen.configuration_qwen import QWenConfig
from qquant.models.qwen.modeling_qwen import QWenAttention, QWenMLP, QWenRMSNorm, rotate

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = needs_avx2


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def units(got: Tensor, want: Tensor) -> Tensor:
    """How many units of `got`'s last place it is off `want`, a float64."""
    mantissa = 7 if got.dtype == torch.bfloat16 else 23
    unit = 2.0 ** (want.abs().clamp(min=1e-30).log2().floor() - mantissa)
    return (got.double() - want).abs() / unit


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return wide.to(x.dtype).double() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (2, 33, 512)])
def test_a_norm_is_right_to_the_last_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1)
    got = fused.norm(x, weight, 1e-6)
    assert got.shape == x.shape and got.dtype == dtype
    off = units(got, exact_norm(x, weight, 1e-6))
    # Rounded twice in bfloat16: where the first rounding is a near tie, a unit beside it.
    assert off.max() < (4 if dtype == torch.float32 else 2.1)
    assert (off > 0.51).double().mean() < (0.8 if dtype == torch.float32 else 0.01)


def test_a_norms_epsilon_counts() -> None:
    x, weight = 1e-4 * drawn(4, 32), torch.ones(32)
    for eps in (1e-6, 1e-9):
        assert units(fused.norm(x, weight, eps), exact_norm(x, weight, eps)).max() < 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_right_from_nothing_to_the_largest(dtype: torch.dtype) -> None:
    gate = torch.linspace(-90, 90, 4096).to(dtype)
    through = drawn(4096, dtype=dtype)
    want = F.silu(gate.double()).to(dtype).double() * through.double()
    got = fused.gated(gate.clone(), through)
    off = units(got, want)[gate.abs() < 80]
    assert off.max() < (5 if dtype == torch.float32 else 2.1)
    assert (got[gate < -80].double().abs() < 1e-30).all()
    wide = torch.tensor([-3e38, -89.0, 300.0, 3e38] * 4)
    got = fused.gated(wide.to(dtype), torch.ones(16, dtype=dtype)).float()[:4]
    assert not got[:2].any()
    assert torch.equal(got[2:], wide.to(dtype).float()[2:4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none_and_in_its_row(dtype: torch.dtype) -> None:
    x = drawn(4, 64, dtype=dtype)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    got = fused.norm(x, torch.ones(64, dtype=dtype), 1e-6)
    assert got[[0, 3]].isfinite().all() and got[1].isnan().all() and not got[2].isfinite().all()
    gate = fused.gated(x.clone(), torch.ones_like(x))
    assert gate[1, 7].isnan() and gate[2, 9].isinf() and int((~gate.isfinite()).sum()) == 2


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(1, 1, 16), (3, 16, 16), (2, 128, 512), (2, 5, 48), (1, 31, 32)]
)
def test_probabilities_are_those_of_causal_scores(batch: int, queries: int, keys: int) -> None:
    scores = drawn(batch, queries, keys) * 4
    unseen = torch.ones(queries, keys).triu(keys - queries + 1) > 0
    want = scores.double().masked_fill(unseen, -torch.inf).softmax(-1)
    # What lies there and is not seen must not count, whatever it is.
    scores[unseen.expand_as(scores)] = float("nan")
    got = fused.probabilities(scores, torch.full(scores.shape, 7.0, dtype=torch.bfloat16))
    assert units(got, want)[want > 1e-20].max() < 0.55
    assert not got[unseen.expand_as(got)].any()
    assert (got.double().sum(-1) - 1).abs().max() < 4e-3


def test_a_query_without_numbers_has_none() -> None:
    scores = drawn(1, 3, 32)
    scores[0, 1, 4] = float("nan")
    got = fused.probabilities(scores, torch.empty(scores.shape, dtype=torch.bfloat16))
    assert got[0, 1, :31].isnan().all() and got[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(16,), (3, 5, 48), (2, 33, 512)])
def test_narrowing_is_torchs_bit_for_bit(shape: tuple[int, ...]) -> None:
    x = drawn(*shape)
    x.view(-1)[:4] = torch.tensor([float("inf"), 3.4e38, 1e-40, 1 + 2**-8])
    want, before = x.bfloat16(), x.clone()
    for wide in (None, torch.empty_like(x)):
        own = before.clone()
        got = fused.narrow(own, torch.empty(shape, dtype=torch.bfloat16), wide)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
        rounded = own if wide is None else wide
        assert torch.equal(rounded.view(torch.int32), want.float().view(torch.int32))
        assert wide is None or torch.equal(own.view(torch.int32), before.view(torch.int32))
    x.view(-1)[3] = float("nan")
    half = fused.narrow(x, torch.empty(shape, dtype=torch.bfloat16))
    assert all(int(t.isnan().sum()) == 1 for t in (half, x))
    for wrong in (x.double(), x.bfloat16(), x[..., :8], x.expand(2, *shape)):
        assert not fused.narrows(wrong, torch.bfloat16)
        with pytest.raises(RunError):
            fused.narrow(wrong, torch.empty(wrong.shape, dtype=torch.bfloat16))
    assert not fused.narrows(x, torch.float16)
    with pytest.raises(RunError):
        fused.narrow(x, torch.empty(x.numel() - 1, dtype=torch.bfloat16))


def angles(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    turns = drawn(batch, tokens, width // 2, seed=5).repeat(1, 1, 2)
    return turns.cos(), turns.sin()


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width", "turning", "rows"),
    [(1, 1, 1, 32, 32, 1), (2, 3, 5, 64, 64, 1), (2, 3, 7, 128, 96, 2), (3, 8, 33, 128, 128, 3)],
)
def test_rope_turns_halves_of_a_head(
    batch: int, heads: int, tokens: int, width: int, turning: int, rows: int
) -> None:
    whole = drawn(batch, tokens, 3, heads, width)
    cos, sin = angles(rows, tokens, turning)
    for x in (whole[:, :, 1].transpose(1, 2), whole[:, :, 0].transpose(1, 2).contiguous()):
        got = fused.rotated(x, cos, sin)
        want = rotate(x.double(), cos, sin)
        assert got.shape == x.shape and got.transpose(1, 2).is_contiguous()
        assert (got - want).abs().max() < 4e-6
        assert torch.equal(got[..., turning:], x[..., turning:])


@pytest.mark.parametrize("turning", [32, 64])
def test_rope_of_bfloat16_is_torchs(turning: int) -> None:
    """To the bit, with angles of either dtype, in whatever order heads and tokens lie."""
    whole = drawn(2, 7, 3, 5, 64).bfloat16()
    cos, sin = angles(1, 7, turning)
    for x in (whole[:, :, 1].transpose(1, 2), whole[:, :, 0].transpose(1, 2).contiguous()):
        got = fused.rotated(x, cos, sin)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, rotate(x, cos, sin))
        c, s = (angle.bfloat16()[:, None] for angle in (cos, sin))
        own, rest = x[..., :turning], x[..., turning:]
        behind = torch.cat((-own[..., turning // 2 :], own[..., : turning // 2]), -1)
        want = torch.cat((own * c + behind * s, rest), -1)
        assert torch.equal(fused.rotated(x, cos.bfloat16(), sin.bfloat16()), want)


def test_rope_is_only_taken_where_it_is_made_for() -> None:
    x, (cos, sin) = drawn(2, 3, 5, 64), angles(1, 5, 64)
    assert fused.turns(x, cos, sin)
    for wrong in (
        (x.double(), cos, sin),
        (x, cos.bfloat16(), sin.bfloat16()),
        (x, cos.double(), sin),
        (x[..., :48], cos, sin),
        (x[:, :, :4], cos, sin),
        (x, cos[..., :16], sin[..., :16]),  # halves of 8
        (x, cos, sin.transpose(1, 2).contiguous().transpose(1, 2)),
        (x, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
        (x.transpose(2, 3), *angles(1, 64, 64)),
        (x[0], cos, sin),
        (x.requires_grad_(), cos, sin),
    ):
        assert not fused.turns(*wrong)
        with pytest.raises(RunError):
            fused.rotated(*wrong)


def test_every_task_is_taken_once_by_whichever_thread() -> None:
    """With the first thread held up, the others do its share: tasks are not dealt out before."""
    from llvmlite import ir

    emitter = llvm_ir.Emitter(8)
    at, given = emitter.parallel("mark", ("out", "tasks"), addresses=1)
    thread, _ = emitter.thread(at)

    def task(index: Any) -> None:
        seen = emitter.load(at, given["out"], index, emitter.i64, 16)
        emitter.store(at, at.add(seen, emitter.count(1)), given["out"], index, 16)
        behind = at.gep(given["out"], [emitter.count(8)])
        emitter.store(at, thread, behind, index, 16)
        with at.if_then(at.icmp_signed("==", thread, emitter.count(0))):
            held = at.alloca(emitter.i64)
            wait = ir.Function(
                emitter.module, ir.FunctionType(emitter.i32, [emitter.i32]), name="usleep"
            )
            at.store(at.sext(at.call(wait, [emitter.i32(20000)]), emitter.i64), held)

    emitter.each(at, given["tasks"], task)
    at.ret_void()
    program = llvm_code.Program(str(emitter.module))
    for count, tasks in ((1, 0), (1, 5), (2, 1), (4, 64)):
        out = torch.zeros(tasks + 1, 2, dtype=torch.int64)
        program.run("mark", out.data_ptr(), tasks, count=count)
        assert out[:, 0].tolist() == [1] * tasks + [0]
    own = int((out[:tasks, 1] == 0).sum())
    assert own < 16  # its share if they were dealt out


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scores = drawn(13, 160), drawn(160), drawn(3, 21, 48)

    def all_of_them() -> list[Tensor]:
        out = torch.empty(scores.shape, dtype=torch.bfloat16)
        softmax = fused.probabilities(scores.clone(), out)
        rounded = fused.narrow(x.clone(), torch.empty(x.shape, dtype=torch.bfloat16))
        turned = fused.rotated(scores[None, :, :, :32], *angles(1, 21, 32))
        gated = fused.gated(x.clone(), x)
        return [fused.norm(x, weight, 1e-6), gated, softmax, rounded, turned]

    asked, own = [], llvm_code.threads()

    def watched(function: int, given: int, count: int, flags: int) -> None:
        asked.append(count)
        own.run(function, given, count, flags)

    want = all_of_them()
    monkeypatch.setattr(llvm_code, "threads", lambda: own._replace(run=watched))
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert all(torch.equal(a, b) for a, b in zip(all_of_them(), want, strict=True))
        assert asked == [count] * 5
        asked.clear()
    # On a processor with AVX-512: neither does the width of its vectors.
    narrow = llvm_code.Program(fused_ir.Writer().text(), llvm_code.FEATURES)
    monkeypatch.setattr(fused, "_compiled", lambda: narrow)
    assert all(torch.equal(a, b) for a, b in zip(all_of_them(), want, strict=True))


def test_what_it_does_not_take() -> None:
    x = drawn(4, 32)
    assert fused.takes(x, x[0]) and fused.takes(x.bfloat16())
    assert not fused.takes(x, x.bfloat16())
    assert not fused.takes(x.half()) and not fused.takes(x.double())
    assert not fused.takes(x[:, :24]) and not fused.takes(drawn(4, 24)) and not fused.takes(x.T)
    assert not fused.takes(x.to("meta")) and not fused.takes(x, torch.ones(16))
    assert not fused.takes(torch._neg_view(x))
    wanted = x.clone().requires_grad_(True)
    assert not fused.takes(wanted)
    with torch.no_grad():
        assert fused.takes(wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fused.norm(x, torch.ones(48), 1e-6),
        lambda x: fused.norm(x, torch.ones(4, 32), 1e-6),
        lambda x: fused.norm(x.double(), torch.ones(32).double(), 1e-6),
        lambda x: fused.gated(x, x[:2]),
        lambda x: fused.gated(x, x.bfloat16()),
        lambda x: fused.probabilities(x[None], x[None]),
        lambda x: fused.probabilities(x[None, :, :24].contiguous(), x[None, :, :24].bfloat16()),
        lambda x: fused.probabilities(x.T[None].contiguous(), x.T[None].bfloat16()),
        lambda x: fused.probabilities(x[None], x[None].bfloat16().to("meta")),
    ],
)
def test_no_address_of_anything_else_is_taken(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RunError, match="machine code of a block"):
        call(drawn(4, 32))


def modules(dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """Every class that is replaced, in small."""
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64}
    for name in ("2", "3", "2_moe", "3_moe"):
        code = importlib.import_module(f"transformers.models.qwen{name}.modeling_qwen{name}")
        config_of = importlib.import_module(f"transformers.models.qwen{name}")
        stem = "Qwen" + name.replace("_moe", "Moe")
        config = getattr(config_of, f"{stem}Config")(**sizes)
        yield f"{stem}RMSNorm", getattr(code, f"{stem}RMSNorm")(48, eps=1e-5).to(dtype)
        yield f"{stem}MLP", getattr(code, f"{stem}MLP")(config).to(dtype)
    own = QWenConfig(hidden_size=48, intermediate_size=128)
    yield "QWenRMSNorm", QWenRMSNorm(48, eps=1e-5).to(dtype)
    yield "QWenMLP", QWenMLP(own).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_class_computes_what_it_did(dtype: torch.dtype) -> None:
    kinds, called = set(), list[str]()
    for kind, module in modules(dtype):
        assert type(module).__name__ == kind
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.5)
        x = drawn(2, 7, 48, dtype=dtype)
        called.clear()
        for name, child in module.named_modules():
            child.register_forward_hook(lambda *_, name=name: called.append(name))
        with torch.inference_mode():
            want, order = module(x), called.copy()
            called.clear()
            fused_blocks.use(module, CPU)
            assert "forward" in module.__dict__, kind
            got = module(x)
        # The linears in the same order: that of a group is that of its first calls.
        assert called == [n for n in order if n != "act_fn"], kind
        near = 2e-6 if dtype == torch.float32 else 8e-3
        assert (got.double() - want.double()).norm() < near * want.double().norm(), kind
        # With gradients the class's own code, bit for bit, and they arrive.
        x = x.requires_grad_(True)
        out = module(x)
        out.sum().backward()
        assert torch.equal(out, want) and x.grad is not None and x.grad.isfinite().all()
        kinds.add(kind)
    assert kinds == {*fused_blocks._NORMS, *fused_blocks._GATED, fused_blocks._OWN}


def attentions() -> Iterator[tuple[str, nn.Module]]:
    """Every class whose RoPE is replaced, in small; two query heads to one of keys and values."""
    sizes: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 32}
    for name in ("2", "3", "2_moe", "3_moe"):
        code = importlib.import_module(f"transformers.models.qwen{name}.modeling_qwen{name}")
        config_of = importlib.import_module(f"transformers.models.qwen{name}")
        stem = "Qwen" + name.replace("_moe", "Moe")
        config = getattr(config_of, f"{stem}Config")(**sizes, num_key_value_heads=2)
        config._attn_implementation = "sdpa"
        yield f"{stem}Attention", getattr(code, f"{stem}Attention")(config, 0)
    own = QWenConfig(hidden_size=96, num_attention_heads=4, kv_channels=32)
    own._attn_implementation = "sdpa"
    yield "QWenAttention", QWenAttention(own, 0)


def test_every_attention_turns_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.unavailable() is None  # tried before anything is counted
    own, kinds, turned = fused.rotated, [], list[tuple[int, ...]]()
    monkeypatch.setattr(fused, "rotated", lambda x, *a: turned.append(x.shape) or own(x, *a))
    for kind, module in attentions():
        assert type(module).__name__ == kind
        module.eval()
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, std=0.2)
        given = drawn(2, 7, 96), angles(1, 7, 32), None
        with torch.inference_mode():
            want = module(*given[:2], attention_mask=None)[0]
            fused_blocks.use(module, CPU)
            assert not turned
            got = module(*given[:2], attention_mask=None)[0]
        keys = 4 if kind == "QWenAttention" else 2
        assert turned == [(2, 4, 7, 32), (2, keys, 7, 32)], kind
        assert (got - want).norm() < 3e-6 * want.norm(), kind
        turned.clear()
        # Where it is not made for what comes, the class's own function, bit for bit.
        out = module(*given[:2], attention_mask=None)[0]
        out.sum().backward()
        assert torch.equal(out, want) and not turned
        kinds.append(kind)
    assert sorted(kinds) == sorted(fused_blocks._TURNS)


def test_rope_with_logn_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = dict(attentions())["QWenAttention"]
    given = {"position_embeddings": angles(1, 7, 32), "logn": torch.full((1, 1, 7, 1), 1.5)}
    x, turned, own = drawn(2, 7, 96), [], fused.rotated
    monkeypatch.setattr(fused, "rotated", lambda x, *a: turned.append(x) or own(x, *a))
    with torch.inference_mode():
        want = module(x, **given)[0]
        fused_blocks.use(module, CPU)
        got = module(x, **given)[0]
    assert len(turned) == 1  # the keys, which have no logn
    assert (got - want).norm() < 3e-6 * want.norm()


def test_an_attention_that_calls_no_such_function_is_left_alone() -> None:
    class Qwen2Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.apply_rotary_pos_emb(x)

        def apply_rotary_pos_emb(self, x: Tensor) -> Tensor:
            return x

    module = Qwen2Attention()
    fused_blocks.use(module, CPU)
    assert "forward" not in module.__dict__


def test_other_activations_and_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = handmade.tiny_qwen2(layers=1, hidden_act="gelu")
    fused_blocks.use(gelu, CPU)
    replaced = {type(m).__name__ for m in gelu.modules() if "forward" in m.__dict__}
    assert replaced == {"Qwen2RMSNorm", "Qwen2Attention"}
    model = handmade.tiny_qwen2(layers=1)
    fused_blocks.use(model, torch.device("cuda"))
    monkeypatch.setattr(fused, "unavailable", lambda: "no llvmlite")
    fused_blocks.use(model, CPU)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_trial_sees_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    known = fused.unavailable.__wrapped__
    assert known() is None
    for name in ("norm", "gated", "probabilities", "narrow", "rotated"):
        right = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, right=right: right(*a) * 1.01)
        assert known() == "its results are not those of plain torch"
        monkeypatch.setattr(fused, name, lambda *a, right=right: right(*a) * float("nan"))
        assert known() == "its results are not those of plain torch"
        monkeypatch.setattr(fused, name, right)
    monkeypatch.setattr(llvm_code, "unavailable", lambda: "llvmlite is not installed")
    assert known() == "llvmlite is not installed"


@pytest.mark.parametrize("layout", ["qwen2", "qwen"])
def test_a_run_is_as_good_with_it(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = handmade.tiny_qwen2() if layout == "qwen2" else handmade.tiny_qwen1()
    blocks = "model.layers" if layout == "qwen2" else "transformer.h"
    _, dense = handmade.make_pair(model, tmp_path, blocks=blocks)
    ids = torch.randint(0, 100, (64, 32), generator=torch.Generator().manual_seed(0))
    assert fused.unavailable() is None  # tried before anything is counted
    calls: list[str] = []
    for name in ("norm", "gated"):
        own = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda *a, own=own, name=name: calls.append(name) or own(*a)
        )
    found = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(fused, "unavailable", lambda: "left out")
        made = quantize(
            dense,
            tmp_path / f"made {there}",
            QuantSpec(bits=3, group_size=32),
            CalibrationSpec(samples=64, seqlen=32),
            tokens=ids,
            device="cpu",
            compute_dtype="float32",
        )
        # Two norms and a gate in each of two blocks, of two streams, for every batch.
        assert (calls.count("norm") >= 8 and calls.count("gated") >= 4) is there
        assert bool(calls) is there
        calls.clear()
        found.append({layer.name: layer.rel_error for layer in made.layers})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 7
    for name, error in found[0].items():
        assert error == pytest.approx(found[1][name], rel=0.05), name
