"""Where a run computes and in what, told without torch where the machine leaves no doubt.

`devices.py` has the rule and asks torch, whose import takes longer than a whole dry run. On a
machine where torch is sure to find no accelerator the same rule is read off what the system says of
the processor; in every other case torch is imported and asked. Whether the system lets a process
run code that it has written (`int16`) only a run finds out; where not, it computes in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .host import cpu_multiplies_bfloat16, int16_is_fastest, no_accelerator

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """By torch's names.

    Attributes:
        device: `cpu` or `cuda:0`.
        dtype: such as `float32`.
        int16: as of a `devices.Compute`.
    """

    device: str
    dtype: str
    int16: bool = False

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, int16: bool = False) -> Place:
        """Of what torch is given."""
        return cls(str(device), str(dtype).removeprefix("torch."), int16)

    @property
    def kind(self) -> str:
        """The device's type: `cpu`, `cuda`."""
        return self.device.partition(":")[0]

    @property
    def plain(self) -> bool:
        """Whether this is a CPU whose tensors are float32, as numpy's."""
        return (self.device, self.dtype) == ("cpu", "float32")


def known_place(device: str, compute_dtype: str) -> Place | None:
    """As `find_place`, without torch; None where it would have to be asked."""
    on_cpu = device == "cpu" or (device == "auto" and no_accelerator())
    if on_cpu and compute_dtype == "float32":
        return Place("cpu", "float32")
    if on_cpu and compute_dtype == "auto" and (fast := cpu_multiplies_bfloat16()) is not None:
        return Place("cpu", "bfloat16") if fast else Place("cpu", "float32", int16_is_fastest())
    if on_cpu and compute_dtype == "int16" and int16_is_fastest():
        return Place("cpu", "float32", True)
    return None


def find_place(device: str, compute_dtype: str) -> Place:
    """What `devices.choose_device` and `choose_compute` choose for a run.

    Args:
        device, compute_dtype: as in `quantize`.

    Raises:
        SpecError: as they do.
    """
    if place := known_place(device, compute_dtype):
        return place
    from .devices import choose_compute, choose_device

    found = choose_device(device)
    return Place.of(found, *choose_compute(compute_dtype, found))
