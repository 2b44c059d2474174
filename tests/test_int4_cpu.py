"""Torch's own CPU packing of int4 weights: read back exactly, held instead of the file's."""

from __future__ import annotations

import pytest
import torch
from test_runtime import linear

from qquant import int4_cpu, kernel_choice, kernels
from qquant.int4_cpu import Int4Order, pack_int4
from qquant.int4_torch import Int4
from qquant.kernel_choice import measure_few_tokens
from qquant.kernels import QuantLinear
from qquant.pack import unpack_codes


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 128, 208])
@pytest.mark.parametrize("inputs", [32, 96, 256])
def test_codes_are_read_back(rows, inputs):
    codes = torch.randint(0, 16, (rows, inputs), generator=torch.Generator().manual_seed(rows))
    packed, order = pack_int4(codes), Int4Order.of(rows)
    assert packed.numel() * packed.element_size() == rows * inputs // 2
    for most in (1, 64, 10_000):
        spans = order.spans(rows, most)
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == rows
        assert all(b - a <= max(most, order.block) for a, b in spans)
        for start, stop in spans:
            out = torch.empty(inputs, stop - start)
            order.codes(packed, (start, stop), inputs, out)
            assert torch.equal(out.t(), codes[start:stop].float())


def test_packing_piece_by_piece_is_packing(monkeypatch):
    codes = torch.randint(0, 16, (400, 64), generator=torch.Generator().manual_seed(0))
    whole = int4_cpu._convert(codes)
    int4_cpu._block()  # learnt before anybody watches
    monkeypatch.setattr(int4_cpu, "_PIECE", 1)
    pieces, real = [], int4_cpu._convert
    monkeypatch.setattr(int4_cpu, "_convert", lambda c: (pieces.append(len(c)), real(c))[1])
    assert torch.equal(pack_int4(codes), whole)
    assert pieces == [128, 128, 128, 16]

    def unknown():
        raise int4_cpu._unknown("no blocks")

    pieces.clear()
    monkeypatch.setattr(int4_cpu, "_block", unknown)
    assert torch.equal(pack_int4(codes), whole)
    assert pieces == [400], "where pieces may not be the whole, the whole is packed"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("out", [32, 160])
def test_the_files_packing_is_dropped_and_comes_back(bits, sym, desc_act, out):
    """8 bits as two halves; 2 and 3 bits take the room of 4."""
    module, weight, _ = linear(out, 256, bits=bits, group_size=64, sym=sym, desc_act=desc_act)
    stored = {k: v.clone() for k, v in module.state_dict().items()}
    before = module.nbytes
    module.use("torch-int4")
    assert module.qweight is None and module.packings == 1
    weights, planes = out * 256, 2 if bits == 8 else 1
    held = planes * weights // 2 + planes * 4 * weights // 64  # of the op: codes and its grids
    held += 8 * 256 * desc_act  # and in which order it takes the inputs
    assert module.nbytes - before == held - bits * weights // 8  # and nothing more
    assert torch.equal(module.codes(), unpack_codes(stored["qweight"], bits))
    again = module.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[k], stored[k]) for k in stored)
    x = torch.randn(kernels.FEW_TOKENS + 1, 256)
    slack = 1e-6 * (x.double().abs() @ weight.abs().T).max()
    assert (module(x).double() - x.double() @ weight.T).abs().max() <= slack
    assert torch.equal(module.dense(torch.float32).weight.double(), weight.float().double())
    module.use("dequantize")
    assert torch.equal(module.qweight, stored["qweight"]) and module.nbytes == before


def test_a_packing_that_is_not_understood_is_held_beside_the_files(monkeypatch):
    """Another torch may pack otherwise: nothing wrong is computed, and it is said."""
    module, weight, _ = linear(64, 128, group_size=32)
    honest = Int4Order.of(64)
    turned = Int4Order(honest.block, honest.whole[::-1], honest.last)
    monkeypatch.setattr(kernels.Int4Order, "of", classmethod(lambda cls, rows: turned))
    module.use("torch-int4")
    assert module.qweight is not None and module.packings == 2
    x = torch.randn(40, 128)
    assert torch.allclose(module(x).double(), x.double() @ weight.T, atol=1e-4)

    def unknown(rows):
        raise int4_cpu._unknown("something else")

    monkeypatch.setattr(kernels.Int4Order, "of", unknown)
    module.use("torch-int4")
    assert module.packings == 2


@pytest.mark.parametrize(("slower_from", "few"), [(64, 32), (32, 16), (4, 2), (1, 1)])
def test_few_tokens_are_as_many_as_the_op_is_quicker_for(slower_from, few, monkeypatch):
    module, _, _ = linear(1024, 1024, group_size=128)
    module.use("torch-int4")
    op, seconds = module._by_held, {}

    def timed(call, times, *, device):
        rows = call.args[0].shape[0]
        seconds[rows] = 1.0
        return 2.0 if call.func == op and rows >= slower_from else 1.0

    monkeypatch.setattr(kernel_choice, "fastest_of", timed)
    assert measure_few_tokens(module, torch.float32) == few
    assert max(seconds) == kernels.FEW_TOKENS  # never asked beyond it


def test_measuring_leaves_torchs_generator_alone(monkeypatch):
    """Who seeds it, loads and samples gets the same each time, whatever a timing says."""
    monkeypatch.setattr(kernel_choice, "_WORTH", 0)
    module, _, _ = linear(32, 64, group_size=32)
    module.use("torch-int4")
    before = torch.get_rng_state()
    measure_few_tokens(module, torch.float32)
    kernel_choice.fastest(module, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_offsets_are_those_of_the_rounded_scales(bits, sym):
    """Their error is one for a whole group: none where the grid is symmetric, else next to none."""
    module, _, _ = linear(32, 256, bits=bits, group_size=64, sym=sym)
    module.use("torch-int4")
    grids = [grid.double() for _, grid in module._held.planes]
    scale = module.scales.to(torch.bfloat16).double()
    zero = module.zeros.t().double()
    assert torch.equal(grids[-1][..., 0], scale)
    if bits == 8:
        assert torch.equal(grids[0][..., 0], 16 * scale)
    middle = 136 if bits == 8 else 2 ** (bits - 1)
    want, got = (middle - zero) * scale, sum(grid[..., 1] for grid in grids)
    off = (got - want).abs().max()
    if sym:
        assert off == 0 and not grids[-1][..., 1].any()
    else:
        assert off <= want.abs().max() * (2**-17 if bits == 8 else 2**-8)


def test_a_module_that_is_moved_where_the_op_does_not_run(monkeypatch, caplog):
    module, weight, _ = linear(32, 64, group_size=32)
    module.use("torch-int4")
    stored = module.state_dict()["qweight"]
    module._held = Int4.pack(module.codes(), module.scales, module.zeros, 4)
    module._held.planes = tuple((c.to("meta"), g.to("meta")) for c, g in module._held.planes)
    module.qweight = stored  # as after a move: torch's packing is elsewhere
    monkeypatch.setattr(kernels, "misfit", lambda *_: "no such op")
    x = torch.randn(1, 64)
    assert torch.allclose(module(x).double(), x.double() @ weight.T, atol=1e-5)
    assert module.kernel == "dequantize" and "no such op" in caplog.text


def test_rows_beyond_few_tokens_go_the_other_way():
    module, _, _ = linear(32, 64, group_size=32)
    module.use("torch-int4")
    module.few_tokens = 4
    seen = []
    real = QuantLinear._by_held
    module._by_held = lambda x: (seen.append(x.shape[0]), real(module, x))[1]
    for rows in (1, 4, 5, 32):
        module(torch.randn(rows, 64))
    assert seen == [1, 4]
