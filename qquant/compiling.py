"""Compiled decoding: what torch.compile is told, and how a model is set up for it.

One setting for whoever decodes compiled, so that what `qquant profile --compile` measures is what
`qquant.load(..., compile=True)` runs: transformers' own compiled call with a static cache.

Left out on purpose: what is compiled, which is transformers' affair.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from .errors import MissingDependencyError

BACKEND = "inductor"  # of torch.compile; transformers' default
COMPILERS = ("g++", "clang++", "c++", "cl")


def compile_config() -> Any:
    """transformers' `CompileConfig`, for every device: by itself it leaves a CPU out."""
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(backend=BACKEND)
    config._compile_all_devices = True
    return config


def compile_generate(model: Any) -> None:
    """Lets the model's `generate` decode compiled, on a static cache.

    Raises:
        MissingDependencyError: there is nothing to compile with.
    """
    check_compiler()
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = compile_config()


def check_compiler() -> None:
    """Refuses to compile where torch would find nothing to compile with.

    Raises:
        MissingDependencyError: there is no C++ compiler.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        raise MissingDependencyError(
            "--compile",
            expected="a C++ compiler, which torch.compile uses",
            got=f"CXX={named}" if named else "none installed",
            cure="Install g++, or leave --compile (compile=True) out.",
        )
