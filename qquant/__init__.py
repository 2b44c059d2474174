"""qquant: turns a Qwen checkpoint directory into a quantized one that loads with `from_pretrained`.

The public names below are looked up on first use (PEP 562), so that `import qquant` loads neither
torch nor transformers and changes nothing in the process. In particular the Auto classes learn of
original Qwen only when `qquant.register()` is called. `qquant.verify` is the module; the two
functions that look at a directory are exported under names of their own, `verify_directory` and
`inspect_directory`, because a function of a submodule's name would be replaced by the submodule as
soon as anything imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bnb import save
    from .bnb_spec import BnbSpec
    from .config import CalibrationSpec, OutputSpec, QuantSpec, spec_from_recipe
    from .errors import QQuantError
    from .methods import quantize
    from .models import register
    from .reproduce import reproduce as reproduce_directory
    from .result import Result
    from .runtime import load
    from .verify import inspect as inspect_directory
    from .verify import verify as verify_directory

__version__ = "0.1.0"

__all__ = [
    "BnbSpec",
    "CalibrationSpec",
    "OutputSpec",
    "QQuantError",
    "QuantSpec",
    "Result",
    "__version__",
    "inspect_directory",
    "load",
    "quantize",
    "register",
    "reproduce_directory",
    "save",
    "spec_from_recipe",
    "verify_directory",
]

# Public name -> the submodule that holds it and its name there.
_EXPORTS = {
    "BnbSpec": ("bnb_spec", "BnbSpec"),
    "CalibrationSpec": ("config", "CalibrationSpec"),
    "OutputSpec": ("config", "OutputSpec"),
    "QQuantError": ("errors", "QQuantError"),
    "QuantSpec": ("config", "QuantSpec"),
    "Result": ("result", "Result"),
    "inspect_directory": ("verify", "inspect"),
    "load": ("runtime", "load"),
    "quantize": ("methods", "quantize"),
    "register": ("models", "register"),
    "reproduce_directory": ("reproduce", "reproduce"),
    "save": ("bnb", "save"),
    "spec_from_recipe": ("config", "spec_from_recipe"),
    "verify_directory": ("verify", "verify"),
}


def __getattr__(name: str) -> Any:
    """The public name `name`, imported now and kept.

    Raises:
        AttributeError: qquant exports no such name.
    """
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
