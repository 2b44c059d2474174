"""Which task is run, and how: one frozen value for each. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import SpecError

QWEN_CHAT = "qwen-chat"
PRESETS = (QWEN_CHAT,)
# By generator; those that lm-eval's command has by default (`lm_eval run --help`, --seed).
SEEDS: Mapping[str, int] = MappingProxyType(
    {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
)


@dataclass(frozen=True)
class TaskSpec:
    """One task of lm-eval's.

    Attributes:
        task: its name, a group's, or the path of a task's own yaml file.
        limit: questions, at the most, of each task in it; None for all.
        shots: examples before each question; None for what the task says. A task that is made to
            be asked without examples is.
        chat_template: ask in the tokenizer's chat template, examples as turns.
        preset: `qwen-chat`: Qwen's zero-shot chat protocol (see `chat`).
        data_dir: the folder with the original files (see `local`); None for the hub.
        run_code: let HumanEval run what the model wrote, in a sandbox.
        batch: questions at a time.
    """

    task: str
    limit: int | None = None
    shots: int | None = None
    chat_template: bool = False
    preset: str | None = None
    data_dir: str | None = None
    run_code: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--limit", self.limit, 1),
            ("--shots", self.shots, 0),
            ("--task-batch", self.batch, 1),
        ):
            if value is not None and value < least:
                raise SpecError(name, expected=f"at least {least}", got=value)
        if self.preset is not None and self.preset not in PRESETS:
            raise SpecError("--preset", expected=" or ".join(PRESETS), got=self.preset)
        if self.preset and self.shots:
            raise SpecError(
                f"--preset {self.preset}",
                expected="no examples",
                got=f"--shots {self.shots}",
                cure="Leave one of them out",
            )

    @property
    def chat(self) -> bool:
        """Whether questions are asked in the chat template."""
        return self.chat_template or self.preset == QWEN_CHAT
