"""Quick measurements stand for what they are multiplied to."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

import qquant.pace as pace
from qquant import QuantSpec, columns, gptq, int16, spec_from_recipe
from qquant.hessian import Hessian
from qquant.host import threads
from qquant.models.shapes import Group
from qquant.pace import Pace
from qquant.timings import fastest_of

STEADY = Pace(product=1e-11, element=2e-10, call=1e-6, threads=2)


def test_it_measures_in_the_time_it_has() -> None:
    found = []
    seconds = fastest_of(lambda: found.append(Pace.measure(256, 256)), 1, warm=False)
    assert seconds < 20 * pace.QUICK
    assert 0 < found[0].product < found[0].element < found[0].call
    assert found[0].threads == threads()


@pytest.mark.parametrize(("said", "count"), [("3", 3), ("3,2", 3), ("", None), ("x", None)])
def test_threads_are_those_of_the_environment(
    said: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads() == (count or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    "more",
    [
        {"sweeps": 5},
        {"scale_search": 40},
        {"correct_damp": 0.05},
    ],
)
def test_settings_that_ask_for_more_take_longer(more: dict[str, object]) -> None:
    spec = QuantSpec()
    assert STEADY.solve(512, 512, replace(spec, **more)) > STEADY.solve(512, 512, spec)
    assert STEADY.solve(512, 512, spec) > STEADY.solve(512, 512, spec_from_recipe("fast"))


def test_fewer_threads_take_longer_where_work_is_shared() -> None:
    one, group = replace(STEADY, threads=1), Group((512,), 512)
    assert one.hessian(group)[0] > STEADY.hessian(group)[0]
    assert one.solve(512, 512, QuantSpec()) > STEADY.solve(512, 512, QuantSpec())


def test_loops_in_machine_code_take_less() -> None:
    calls = replace(STEADY, code=False)
    for spec in (QuantSpec(), spec_from_recipe("fast"), QuantSpec(method="rtn", scale_search=20)):
        assert STEADY.solve(512, 512, spec) < 0.8 * calls.solve(512, 512, spec)


@pytest.mark.alone
@pytest.mark.parametrize("form", ["llvm", "stretches"])
@pytest.mark.parametrize("recipe", ["default", "fast", "qwen"])
def test_a_solve_and_a_hessian_take_about_that_long(
    recipe: str, form: columns.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of three, on any machine; `benchmarks/estimate.py` is stricter on one."""
    if form == "llvm" and (why := columns.choose(torch.device("cpu")).reason):
        pytest.skip(why)
    monkeypatch.setattr(columns, "choose", lambda *_: columns.Choice(form))
    spec, n, k = spec_from_recipe(recipe), 768, 512
    gen = torch.Generator().manual_seed(0)
    w, x = torch.randn(n, k, generator=gen), torch.randn(1024, k, generator=gen)
    h, found = x.T @ x, replace(Pace.measure(k, n), code=form == "llvm")
    cross = {"cross": 0.01 * h, "pull": None} if spec.streams == 2 else {}
    took = fastest_of(partial(gptq.solve, w, h, spec, **cross), 2)
    assert 1 / 3 < found.solve(n, k, spec) / took < 3
    for narrow in (False, True) if not int16.unavailable() else (False,):
        sums = Hessian(k, integers=int16.Columns if narrow else None)
        took = fastest_of(partial(sums.add, x), 3) / len(x)
        assert 1 / 3 < replace(found, int16=narrow).hessian(Group((n,), k))[0] / took < 3
