"""What tests of several modules share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A test that takes it runs once on the CPU and once on a GPU, where there is one."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(autouse=True)
def _the_log_is_left_alone() -> Iterator[None]:
    """A test that silenced qquant's log would make later tests of warnings fail, far away."""
    own = logging.getLogger("qquant")

    def state() -> tuple[object, ...]:
        return own.level, own.disabled, own.propagate, own.handlers[:], logging.root.manager.disable

    before = state()
    yield
    assert state() == before
