"""What the packings that kernels take, in place of the file's, have in common: being read back.

Left out on purpose: the packings (`int4_torch.Int4`, `avx2.Avx2`) and their products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor


class Held(ABC):
    """A linear's weights as a kernel takes them.

    Attributes:
        inputs: of the linear.
        gather: int64 [K], the inputs group by group; None where they lie so.
    """

    inputs: int
    gather: Tensor | None

    @abstractmethod
    def spans(self, most: int) -> list[tuple[int, int]]:
        """Outputs in runs that can be read by themselves, of about `most`."""

    @abstractmethod
    def read(self, span: tuple[int, int], out: Tensor) -> None:
        """The codes of the outputs of a span, as numbers, transposed, their inputs as gathered.

        Args:
            out: [K, outputs of the span], of a dtype that holds them.
        """

    def gathered(self, x: Tensor) -> Tensor:
        """Inputs [M, K] in the order of the codes."""
        return x if self.gather is None else x[:, self.gather]

    def codes(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the linear and their codes, uint8 [rows, K], about `most` of them at a time."""
        for start, stop in self.spans(most):
            part = torch.empty(self.inputs, stop - start, dtype=torch.uint8)
            self.read((start, stop), part)
            if self.gather is not None:
                part = torch.empty_like(part).index_copy_(0, self.gather, part)
            yield slice(start, stop), part.t()
