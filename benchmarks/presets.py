"""What can be measured by name: which checkpoint, which candidates, how much text.

Two kinds. `small`, `speed` and `qwen-1.8b` are random weights of a shape (`checkpoints.py`), read
random ids, and serve for time and memory. `demo` (bundled) and `second` (trained by
`scripts/train_second.py`, eleven minutes, when it is not there) are trained, and serve for
accuracy: calibration is text of the model's own domain (`in`) or of another (`out`: qquant's
builtin conversations as plain text), and held-out text is of the model's domain. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEED = (
    "qquant",
    "qquant:recipe=fast",
    "qquant:recipe=qwen",
    "gptqmodel",
    "llmcompressor",
    "rtn",
)
ACCURACY = (
    "qquant",
    "qquant:recipe=fast",
    "qquant:recipe=best",
    "gptqmodel",
    "llmcompressor",
    "autoround",
    "rtn",
)


@dataclass(frozen=True)
class Preset:
    """Sizes and defaults.

    Attributes:
        samples, seqlen: of the calibration.
        heldout: sequences of `seqlen` held-out tokens; 0 for no accuracy.
        trained: there is a tokenizer, and text to read with it.
    """

    samples: int = 128
    seqlen: int = 512
    heldout: int = 80
    bits: tuple[int, ...] = (4, 3)
    candidates: tuple[str, ...] = field(default=SPEED)
    trained: bool = False


PRESETS = {
    "small": Preset(samples=16, seqlen=128, heldout=8),
    "speed": Preset(heldout=8),
    "demo": Preset(heldout=96, bits=(4, 3, 2), candidates=ACCURACY, trained=True),
    "second": Preset(heldout=96, bits=(4, 3, 2), candidates=ACCURACY, trained=True),
    "qwen-1.8b": Preset(heldout=0),
}


@dataclass(frozen=True)
class Trained:
    """Where a trained preset's parts are.

    Attributes:
        model: the checkpoint with its tokenizer.
        heldout: a text file of its domain that it never saw.
        domain: a text file it was trained on; None where `token_files.py` has a kind of its own.
    """

    model: Path
    heldout: Path
    domain: Path | None = None


def trained(preset: str, second: Path) -> Trained:
    """The parts of `demo`, or of `second` in its directory."""
    if preset == "demo":
        return Trained(ROOT / "demo" / "qwen-demo", ROOT / "demo" / "heldout.txt")
    return Trained(second / "model", second / "heldout.txt", second / "domain.txt")
