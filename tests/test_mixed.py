"""Bits per linear: the choice against exhaustive search, the measure against autograd on the whole
model, and whole runs on tiny checkpoints whose files say what they hold."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_convert import make, plain_weights_of
from torch import Tensor

from qquant import gptq, sensitivity
from qquant.calibration.hold import Holder
from qquant.checkpoint import Checkpoint
from qquant.cli import cli
from qquant.config import QuantSpec
from qquant.convert import quantize
from qquant.errors import CheckpointError, NumericsError, SpecError
from qquant.events import Stage
from qquant.layout import Layout
from qquant.mixed import Unit, budget_bits, choose, mix, storage_bits
from qquant.models.families import FAMILIES, family_of
from qquant.models.skeleton import Skeleton
from qquant.pack import pack
from qquant.result import Result
from qquant.runtime import load
from qquant.verify import inspect, verify

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
CHOICES = (3, 4, 8)
SPEC = QuantSpec(group_size=32, target_bpw=5.2)


def units_of(sizes: list[list[int]], losses: list[list[float]], choices=CHOICES) -> list[Unit]:
    return [
        Unit(
            i, (f"u{i}",), 1, dict(zip(choices, s, strict=True)), dict(zip(choices, x, strict=True))
        )
        for i, (s, x) in enumerate(zip(sizes, losses, strict=True))
    ]


def random_units(seed: int, count: int = 5, largest: int = 40) -> list[Unit]:
    draw = random.Random(seed)
    sizes = [sorted(draw.sample(range(1, largest), 3)) for _ in range(count)]
    losses = [sorted((draw.random() for _ in range(3)), reverse=True) for _ in range(count)]
    return units_of(sizes, losses)


def cost(units: list[Unit], widths: tuple[int, ...]) -> tuple[int, float]:
    pairs = list(zip(units, widths, strict=True))
    return sum(u.size[b] for u, b in pairs), sum(u.loss[b] for u, b in pairs)


def exhaustive(units: list[Unit], budget: int) -> float:
    every = (cost(units, w) for w in itertools.product(CHOICES, repeat=len(units)))
    return min(loss for size, loss in every if size <= budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_for_every_budget(seed: int) -> None:
    units = random_units(seed)
    pick = choose(units, CHOICES)
    least, most = cost(units, (3,) * 5)[0], cost(units, (8,) * 5)[0]
    for budget in range(least, most + 3):
        size, loss = cost(units, pick(budget))
        assert size <= budget
        assert loss == pytest.approx(exhaustive(units, budget), rel=1e-12)
    with pytest.raises(ValueError, match="below the least"):
        pick(least - 1)


@pytest.mark.parametrize("seed", range(3))
def test_sizes_without_a_common_measure_stay_within_the_budget(seed: int) -> None:
    """Rounded up to fewer budgets, the best may be missed by little; the budget never is."""
    draw = random.Random(seed)
    units = random_units(seed, largest=10**9)
    least, most = cost(units, (3,) * 5)[0], cost(units, (8,) * 5)[0]
    for budget in [draw.randint(least, most) for _ in range(200)] + [least, most]:
        size, loss = cost(units, choose_once(units, budget))
        assert size <= budget
        assert loss <= exhaustive(
            units, budget - most // 10_000 if budget > least * 1.01 else least
        )
    assert cost(units, choose_once(units, most))[1] == pytest.approx(exhaustive(units, most))


_picks: dict[int, Any] = {}


def choose_once(units: list[Unit], budget: int) -> tuple[int, ...]:
    if id(units) not in _picks:
        _picks[id(units)] = (choose(units, CHOICES), units)
    return _picks[id(units)][0](budget)


def test_a_more_costly_width_that_is_no_better_is_not_taken() -> None:
    units = units_of([[3, 4, 8], [3, 4, 8]], [[1.0, 1.0, 1.0], [2.0, 3.0, 1.0]])
    assert choose(units, CHOICES)(16) == (3, 8)
    assert choose(units, CHOICES)(8) == (3, 3)


def test_a_budget_printed_is_the_budget_meant() -> None:
    for weights, size in ((3 * 7 * 2**20, 91_750_401), (6_476_005_376, 26_915_897_345)):
        assert budget_bits(size / weights, weights) == size
        assert budget_bits((size - 0.5) / weights, weights) == size - 1
    assert budget_bits(4.5, 1001) == 4504


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_size_is_that_of_the_packed_tensors(bits: int, group: int) -> None:
    n, k = 64, 96
    groups = 1 if group == -1 else k // group
    packed = pack(
        torch.zeros(n, k, dtype=torch.uint8),
        torch.ones(n, groups),
        torch.ones(n, groups, dtype=torch.uint8),
        bits=bits,
        group_size=group,
    )
    stored = packed.qweight.nbytes + packed.qzeros.nbytes + packed.scales.nbytes
    assert storage_bits(n, k, groups, bits) == 8 * stored


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_rules_match_the_parts_and_the_fused_name_and_nothing_else(family) -> None:
    kinds = {part: whole for whole, parts in family.fused for part in parts}
    groups: dict[str, list[str]] = {}
    for name in family.linears:
        groups.setdefault(kinds.get(name, name), []).append(name)
    draw = random.Random(0)
    units = [
        Unit(block, tuple(names), 10, {3: 30, 4: 40, 8: 80}, {3: 3.0, 4: 2.0, 8: draw.random()})
        for block in range(12)
        for names in groups.values()
    ]
    found = mix(units, QuantSpec(target_bpw=4.7))
    assert len(set(found.chosen.widths)) > 1
    rules = found.rules(family)
    assert all(key.startswith("+:") for key in rules)
    layout = Layout.parse({"bits": found.base, "group_size": 128, "dynamic": rules})
    for unit, bits in zip(units, found.chosen.widths, strict=True):
        fused = [w for w, parts in family.fused if set(parts) == set(unit.names)]
        for name in (*unit.names, *fused):
            full = f"{family.blocks}.{unit.block}.{name}"
            own = layout.of(full)
            assert own is not None and own.bits == bits
            assert (layout.rule_of(full) is None) == (bits == found.base)
            assert layout.rule_of(full + "x") is None and layout.rule_of("x" + full) is None
    # Block 1 is not block 11, and a dot is a dot.
    assert not any(re.match(key[2:], family.blocks.replace(".", "x") + ".0") for key in rules)
    assert found.bits(family).keys() == {
        f"{family.blocks}.{i}.{name}" for i in range(12) for name in family.linears
    }
    widths = list(found.bits(family).values())
    assert widths.count(found.base) == max(map(widths.count, set(widths)))


def test_the_curve_falls_and_holds_the_uniform_widths() -> None:
    units = random_units(1, count=8, largest=90)
    found = mix([replace(u, weights=10) for u in units], QuantSpec(target_bpw=4.1))
    points = found.curve
    assert [p.bits_per_weight for p in points] == sorted(
        (p.bits_per_weight for p in points), reverse=True
    )
    targets = [p for p in points if p.target is not None]
    assert all(p.bits_per_weight <= p.target for p in targets)
    losses = [p.loss for p in targets]
    assert losses == sorted(losses)
    assert {p.uniform for p in points if p.target is None} == {3, 4, 8}
    assert sum(p is found.chosen for p in points) == 1
    for point in (p for p in points if p.target is None):  # never worse than uniform at its size
        better = mix(
            [replace(u, weights=10) for u in units], QuantSpec(target_bpw=point.bits_per_weight)
        ).chosen
        assert better.loss <= point.loss and better.bits_per_weight <= point.bits_per_weight
    shown = found.render()
    assert "<- written" in shown and "uniform 4" in shown


# --- what is measured


def skeleton_of(path: Path) -> Skeleton:
    source = Checkpoint.open(path)
    return Skeleton(source, family_of(source.config), torch.device("cpu"), torch.float32)


def measured(path: Path, spec: QuantSpec = SPEC, **changes: Any) -> sensitivity.Measured:
    settings = {"batch_tokens": 72, "holder": Holder(host_budget=2**40)} | changes
    return sensitivity.measure(skeleton_of(path), TOKENS, spec, **settings)


@pytest.mark.parametrize("kind", ["qwen", "qwen2", "qwen3"])
def test_losses_are_those_of_the_whole_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block at a time gives what autograd gives on the model loaded whole."""
    src = make(kind, tmp_path / "src")
    heads: list[list[Tensor]] = []
    original = sensitivity._head_gradient

    def watch(*args: Any, **kwargs: Any) -> list[Tensor]:
        found = original(*args, **kwargs)
        heads.append([g.clone() for g in found])
        return found

    monkeypatch.setattr(sensitivity, "_head_gradient", watch)
    found = measured(src)
    assert found.tokens == found.gradient_tokens == TOKENS.numel()

    model = load(src, device="cpu", dtype="float32").model
    family = family_of(Checkpoint.open(src).config)
    seen: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name in family.linear_names(Checkpoint.open(src).tensors):

        def keep(_m: Any, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach()
            out.requires_grad_(True) if out.is_leaf else out.retain_grad()
            seen[name] = out

        model.get_submodule(name).register_forward_hook(keep)
    last: list[Tensor] = []
    blocks = model.get_submodule(family.blocks)
    blocks[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    embeds = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    model(inputs_embeds=embeds)
    last[0].backward(torch.cat(heads[0]))

    for unit in found.units:
        names = [f"{family.blocks}.{unit.block}.{name}" for name in unit.names]
        x = inputs[names[0]].reshape(-1, inputs[names[0]].shape[-1]).float()
        h = 2 / x.shape[0] * x.T @ x
        w = torch.cat([model.get_submodule(name).weight for name in names]).detach()
        grads = [seen[name].grad.reshape(x.shape[0], -1) for name in names]
        weights = torch.cat([g.square().mean(0) for g in grads]).double()
        for bits in CHOICES:
            spec = replace(SPEC, bits=bits, sweeps=0)
            want = float((gptq.solve(w, h, spec).row_loss * weights).sum()) / 4
            assert unit.loss[bits] == pytest.approx(want, rel=0.02), names
        assert unit.loss[3] > unit.loss[4] > unit.loss[8] > 0


def test_the_heads_gradient_is_that_of_a_drawn_token(tmp_path: Path) -> None:
    """Each row is the gradient of log p(y) for one y, and y follows p."""
    skeleton = skeleton_of(make("qwen2", tmp_path / "src"))
    source = skeleton.checkpoint
    norm = source.read("model.norm.weight").float()
    head = source.read("lm_head.weight").float()
    state = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)) * 2
    state = state.expand(1, 3000, 64).contiguous()
    (got,) = sensitivity._head_gradient(skeleton, [state])

    leaf = state[0, :1].clone().requires_grad_(True)
    eps = skeleton.config.rms_norm_eps
    normed = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + eps) * norm
    logs = (normed @ head.T).log_softmax(-1)[0]
    every = torch.stack(
        [torch.autograd.grad(logs[y], leaf, retain_graph=True)[0][0] for y in range(len(logs))]
    )
    distance = torch.cdist(got[0], every)
    drawn = distance.argmin(1)
    assert float(distance.min(1).values.max()) < 1e-3 * float(every.norm(dim=1).mean())
    counts = torch.bincount(drawn, minlength=len(logs)) / 3000
    p = logs.exp().detach()
    assert float((counts - p).abs().max()) < 5 * float((p / 3000).sqrt().max())
    assert len(set(drawn.tolist())) > 20


def test_slices_of_the_head_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of(make("qwen2", tmp_path / "src"))
    state = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sensitivity, "_ROWS", 100)
    (cut,) = sensitivity._head_gradient(skeleton, [state])
    assert cut.shape == state.shape and bool(cut.abs().sum(-1).gt(0).all())
    # The draw differs with the slices' noise; the gradients' size does not.
    monkeypatch.setattr(sensitivity, "_ROWS", 4096)
    (whole,) = sensitivity._head_gradient(skeleton, [state])
    assert float(cut.norm()) == pytest.approx(float(whole.norm()), rel=0.2)


def test_gradients_on_a_gpu_are_of_attention_that_sums_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the fused kernels, which a CPU keeps."""
    attend = torch.nn.functional.scaled_dot_product_attention
    backward, chosen = sensitivity._backward, sensitivity._repeatable
    cuda, fused = torch.backends.cuda, []

    def watch(*args: Any, **more: Any) -> Tensor:
        assert cuda.math_sdp_enabled()
        fused.append(cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled())
        return attend(*args, **more)

    def watched(*args: Any) -> dict[str, Tensor]:
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
            return backward(*args)

    monkeypatch.setattr(sensitivity, "_backward", watched)
    src = make("qwen2", tmp_path / "src")
    want = measured(src)
    assert fused and all(fused)
    fused.clear()
    checkpoint, heads = sensitivity.checkpoint, []

    def one_head(func: Any, query: Tensor, *args: Any, **more: Any) -> Tensor:
        heads.append(query.shape[1])
        return checkpoint(func, query, *args, **more)

    monkeypatch.setattr(sensitivity, "checkpoint", one_head)
    monkeypatch.setattr(sensitivity, "_repeatable", lambda _: chosen(torch.device("cuda", 0)))
    got = measured(src)
    assert fused and not any(fused)
    assert set(heads) == {1}, "scores of one head at a time"
    for a, b in zip(want.units, got.units, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_spilled_inputs_give_the_same_numbers(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    spilling = Holder(host_budget=0, spill_dir=tmp_path)
    assert measured(src) == measured(src, holder=spilling)
    assert spilling.spilled_bytes > 0


def test_the_estimate_is_near_the_kl_of_the_rounded_model(tmp_path: Path) -> None:
    """Weights of each width put into the model whole: KL in nats within half to twice the sum."""
    src = make("qwen2", tmp_path / "src")
    units = measured(src).units
    reference = load(src, device="cpu", dtype="float32").model
    with torch.no_grad():
        want = reference(TOKENS).logits.double().log_softmax(-1)
    for bits in (3, 4):
        dst = tmp_path / str(bits)
        spec = QuantSpec(bits=bits, group_size=32, sweeps=0, correct=0.0)
        quantize(src, dst, spec, tokens=TOKENS, device="cpu")
        with torch.no_grad():
            got = load(dst, device="cpu", kernel="dense", dtype="float32").model(TOKENS).logits
        kl = float((want.exp() * (want - got.double().log_softmax(-1))).sum(-1).mean())
        estimate = sum(unit.loss[bits] for unit in units)
        assert 0.5 < estimate / kl < 2, (bits, estimate, kl)


def test_dead_and_singular_inputs_are_measured(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(32, 64, generator=g)
    x = torch.randn(10, 64, generator=g)  # rank 10
    x[:, 5] = 0
    h = x.T @ x / 5
    losses = sensitivity.row_losses(w, h, SPEC, CHOICES)
    assert all(bool(torch.isfinite(t).all()) for t in losses.values())
    assert float(losses[3].sum()) > float(losses[4].sum()) > float(losses[8].sum()) > 0


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    skeleton = skeleton_of(make("qwen2", tmp_path / "src"))
    skeleton.embed_into = lambda ids, outs: [o.fill_(torch.inf) for o in outs]  # type: ignore[method-assign,assignment]
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        sensitivity.measure(
            skeleton, TOKENS, SPEC, batch_tokens=72, holder=Holder(host_budget=2**40)
        )


# --- whole runs


def run(src: Path, dst: Path, spec: QuantSpec = SPEC, **kwargs: Any) -> Result:
    return quantize(src, dst, spec, tokens=TOKENS, device="cpu", **kwargs)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module", params=["qwen", "qwen2", "qwen3"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(source, directory, result, stages) of a run with a target."""
    root = tmp_path_factory.mktemp(request.param)
    stages: list[str] = []

    def watch(event: object) -> None:
        if isinstance(event, Stage):
            stages.append(event.name)

    src = make(request.param, root / "src")
    return src, root / "dst", run(src, root / "dst", progress=watch), stages


def test_the_files_hold_what_was_chosen(mixed) -> None:
    src, dst, result, stages = mixed
    assert "sensitivity" in stages and result.timings["sensitivity"] > 0
    chosen = result.mixed
    family = family_of(Checkpoint.open(src).config)
    bits = chosen.bits(family)
    assert len(set(bits.values())) > 1
    assert "Plain transformers and optimum cannot read" in chosen.notice()
    assert "transformers with compressed-tensors, vLLM" in chosen.notice(compressed=True)
    quant = config_of(dst)
    assert quant == json.loads((dst / "quantize_config.json").read_text())
    assert quant["bits"] == chosen.base and quant["dynamic"] == chosen.rules(family)
    layout = Layout.parse(quant)
    stored = load_file(dst / "model.safetensors")
    total = weights = 0
    for name, b in bits.items():
        own = layout.of(name)
        assert own is not None and own.bits == b
        words, inputs = stored[f"{name}.qweight"], stored[f"{name}.g_idx"].numel()
        assert words.shape[0] == inputs * b // 32
        weights += inputs * words.shape[1]
        total += 8 * sum(stored[f"{name}.{k}"].nbytes for k in ("qweight", "qzeros", "scales"))
    assert total / weights == chosen.chosen.bits_per_weight <= SPEC.target_bpw
    for unit, b in zip(chosen.units, chosen.chosen.widths, strict=True):
        for more in (w for w in CHOICES if w > b):  # no upgrade fits any more
            assert total + unit.size[more] - unit.size[b] > SPEC.target_bpw * weights
    for whole, parts in family.fused:
        for i in range(2):
            assert len({bits[f"{family.blocks}.{i}.{part}"] for part in parts}) == 1, whole


def test_it_verifies_and_is_shown(mixed) -> None:
    src, dst, result, _ = mixed
    report = verify(dst, against=src)
    assert report.ok and not report.warnings, report.render()
    assert {row.bits for row in report.layers} == set(result.mixed.chosen.widths)
    shown = inspect(dst).render()
    assert "GPTQ mixed: linears" in shown
    card = (dst / "README.md").read_text()
    assert "Not with plain transformers" in card and "GPTQModel.load" in card
    assert "--target-bpw 5.2" in card and "--bits" not in card.split("How to make it again")[1]
    manifest = json.loads((dst / "qquant_manifest.json").read_text())
    assert manifest["mixed"] == json.loads(json.dumps(result.mixed.to_dict()))


def test_load_gives_the_dequantized_model(mixed) -> None:
    src, dst, _, _ = mixed
    loaded = load(dst, device="cpu", dtype="float32").model
    reference = load(src, device="cpu", dtype="float32").model
    weights = plain_weights_of(dst)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[name])
        want = reference(TOKENS[:2]).logits
        torch.testing.assert_close(loaded(TOKENS[:2]).logits, want, atol=1e-4, rtol=1e-3)


def test_the_same_run_gives_the_same_bytes(mixed, tmp_path: Path) -> None:
    src, dst, _, _ = mixed
    run(src, tmp_path / "again")
    for file in sorted(dst.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def edit(path: Path, change: Any) -> Path:
    """The quantization config in both files, changed alike."""
    for name in ("config.json", "quantize_config.json"):
        whole = json.loads((path / name).read_text())
        change(whole.get("quantization_config", whole))
        (path / name).write_text(json.dumps(whole))
    for hashes in ("qquant_manifest.json", "SHA256SUMS"):
        (path / hashes).unlink(missing_ok=True)
    return path


@pytest.fixture
def copy(mixed, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(mixed[1], tmp_path / "copy")


def other(quant: dict[str, Any]) -> None:
    key = next(iter(quant["dynamic"]))
    quant["dynamic"][key] = {"bits": 3 if quant["dynamic"][key]["bits"] != 3 else 4}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(other, id="another width"),
        pytest.param(lambda q: q["dynamic"].popitem(), id="a rule missing"),
        pytest.param(lambda q: q.update(dynamic={"-:.*": {}}), id="left out"),
        pytest.param(lambda q: q.update(dynamic={".*": {"bits": 8}, **q["dynamic"]}), id="first"),
    ],
)
def test_a_rule_that_contradicts_the_tensors_is_found_and_not_loaded(copy: Path, change) -> None:
    edit(copy, change)
    assert not verify(copy).ok
    with pytest.raises(CheckpointError):
        load(copy, device="cpu")


def test_the_two_configs_must_have_the_same_rules(copy: Path) -> None:
    whole = json.loads((copy / "quantize_config.json").read_text())
    del whole["dynamic"]
    (copy / "quantize_config.json").write_text(json.dumps(whole))
    for hashes in ("qquant_manifest.json", "SHA256SUMS"):
        (copy / hashes).unlink()
    assert [p for p in verify(copy).problems if "dynamic" in p.key]


def test_rules_that_other_readers_miss_are_warned_about(tmp_path: Path) -> None:
    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    quantize(src, dst, QuantSpec(group_size=32), tokens=TOKENS, device="cpu")
    same = {"bits": 4}

    def warned(rules: dict[str, Any]) -> str:
        edit(dst, lambda quant: quant.update(dynamic=rules))
        report = verify(dst)
        assert report.ok
        return " ".join(map(str, report.warnings))

    assert warned({}) == ""
    assert "nothing.*" in warned({"nothing.*": same})
    eight = {"bits": 4, "group_size": 32, "desc_act": True}
    assert "qkv_proj" in warned({r".*\.q_proj": eight})
    assert "SGLang" in warned({r".*\.(q|k|v)_proj$": eight})
    assert warned({r".*\.(q|k|v|qkv)_proj$": eight}) == ""


def test_a_linear_left_out_by_a_rule_is_loaded_plain(tmp_path: Path) -> None:
    """As GPTQModel writes it: `-:` rules, and the weights of those modules as they were."""
    from safetensors.torch import save_file

    src, dst = make("qwen2", tmp_path / "src"), tmp_path / "dst"
    quantize(src, dst, QuantSpec(group_size=32), tokens=TOKENS, device="cpu")
    original, stored = (load_file(p / "model.safetensors") for p in (src, dst))
    name = "model.layers.1.mlp.down_proj"
    stored = {k: t for k, t in stored.items() if not k.startswith(name)}
    save_file(stored, dst / "model.safetensors", {"format": "pt"})
    edit(dst, lambda quant: None)
    assert not verify(dst).ok  # a linear is gone
    stored[f"{name}.weight"] = original[f"{name}.weight"].half()
    save_file(stored, dst / "model.safetensors", {"format": "pt"})
    edit(dst, lambda quant: quant.update(dynamic={r"-:.*\.1\.mlp\.down_proj": {}}))
    report = verify(dst, against=src)
    assert report.ok, report.render()
    model = load(dst, device="cpu", dtype="float32").model
    assert torch.equal(model.get_submodule(name).weight, stored[f"{name}.weight"].float())
    edit(dst, lambda quant: quant.pop("dynamic"))
    assert verify(dst).warnings


def test_more_room_is_never_worse_and_the_ends_are_uniform(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    low = run(src, tmp_path / "low", replace(SPEC, target_bpw=3 + 19 / 32 + 1e-9))
    assert set(low.mixed.chosen.widths) == {3} and "dynamic" not in config_of(tmp_path / "low")
    assert low.mixed.notice() == "Every linear has 3 bits: what reads --bits 3 reads it."
    assert "With transformers" in (tmp_path / "low" / "README.md").read_text()
    plain = quantize(
        src, tmp_path / "3", QuantSpec(bits=3, group_size=32), tokens=TOKENS, device="cpu"
    )
    one, two = (tmp_path / d / "model.safetensors" for d in ("low", "3"))
    assert one.read_bytes() == two.read_bytes() and plain.mixed is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--target-bpw", "2"], ["target_bpw", "3.594", "--bit-choices 2,3,4,8"]),
        (["--target-bpw", "9"], ["target_bpw", "8.750", "--bits 8"]),
        (["--target-bpw", "-1"], ["target_bpw", "above 0", "--target-bpw 4.5"]),
        (["--target-bpw", "nan"], ["target_bpw", "above 0"]),
        (["--target-bpw", "4.5", "--bits", "4"], ["--bits and --target-bpw", "--bit-choices"]),
        (["--target-bpw", "4.5", "--method", "rtn"], ["method", "gptq", "--method out"]),
        (["--target-bpw", "4.5", "--bit-choices", "4"], ["bit_choices", "two or more"]),
        (["--target-bpw", "4.5", "--bit-choices", "4,3"], ["bit_choices", "rising", "4,8"]),
        (["--target-bpw", "4.5", "--bit-choices", "4,5"], ["bit_choices", "(2, 3, 4, 8)"]),
        (["--target-bpw", "4.5", "--bit-choices", "a"], ["--bit-choices", "3,4,8"]),
    ],
)
def test_bad_targets_are_refused_with_the_cure(
    args: list[str], words: list[str], tmp_path: Path
) -> None:
    src = make("qwen2", tmp_path / "src")
    more = ["--group-size", "32", "--device", "cpu"]
    result = CliRunner().invoke(
        cli, ["quantize", str(src), "-o", str(tmp_path / "x"), *args, *more]
    )
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_the_range_in_the_message_is_allowed(tmp_path: Path) -> None:
    src = make("qwen2", tmp_path / "src")
    with pytest.raises(SpecError) as caught:
        run(src, tmp_path / "dst", replace(SPEC, target_bpw=1.0))
    low, high = re.findall(r"\d+\.\d{3}", str(caught.value))
    assert float(low) < float(high)
    for target in (float(low), float(high)):
        assert run(src, tmp_path / str(target), replace(SPEC, target_bpw=target)).mixed


def test_the_command_prints_the_curve_and_says_who_reads_it(tmp_path: Path) -> None:
    src = make("qwen", tmp_path / "src")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    args = ["quantize", str(src), "-o", str(tmp_path / "dst"), "--target-bpw", "5.2"]
    args += ["--group-size", "32", "--samples", "4", "--seqlen", "32", "--device", "cpu"]
    args += ["--calib", str(text)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert "5.2 <- written" in result.stdout and "uniform 4" in result.stdout
    assert "Plain transformers and optimum cannot read" in result.stdout
    result = CliRunner().invoke(cli, [*args, "--overwrite", "--log-json"])
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["mixed"]["target_bpw"] == 5.2 and done["mixed"]["curve"]
