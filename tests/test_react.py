"""The ReAct example: what it asks of the model, what it reads out of good and bad texts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from qwen_tiny import N_RANKS, qwen_ranks, tiny_config, write_ranks
from test_qwen_chat import Scripted
from transformers import GenerationConfig

from qquant.models.qwen.tokenization_qwen import QWenTokenizer

SCRIPT = Path(__file__).parents[1] / "examples" / "react.py"


@pytest.fixture(scope="module")
def react() -> ModuleType:
    spec = importlib.util.spec_from_file_location("react", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["react"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_prompt_names_every_tool_and_the_form(react: ModuleType) -> None:
    other = react.Tool("weather", "Tells the weather. 天气", {"type": "object"}, print)
    prompt = react.react_prompt("  What is 2 x 3? ", [react.CALCULATOR, other])
    assert prompt.endswith("Question: What is 2 x 3?")
    assert "one of [multiply, weather]" in prompt and "天气" in prompt
    assert json.dumps(react.CALCULATOR.parameters) in prompt
    words = ["Question:", "Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:"]
    assert [prompt.find("\n" + word) for word in words] == sorted(
        prompt.find("\n" + word) for word in words
    )
    assert -1 not in [prompt.find("\n" + word) for word in words]


@pytest.mark.parametrize("names", [[], ["a", "a"], ["two words"], [""], ["line\nbreak"]])
def test_tools_that_could_not_be_read_back_are_refused(react: ModuleType, names: list[str]) -> None:
    tools = [react.Tool(name, "", {}, print) for name in names]
    with pytest.raises(ValueError, match="tool"):
        react.react_prompt("x", tools)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Thought: I multiply.\nAction: multiply\nAction Input: {"a": 2, "b": 3}\nObservation:',
            ("I multiply.", "multiply", '{"a": 2, "b": 3}'),
        ),
        # No stop word (the length ran out), no thought, spaces, a code fence on several lines.
        ("Action: multiply \nAction Input:  {}", ("", "multiply", "{}")),
        (
            'Thought: t\nAction: multiply\nAction Input: ```json\n{"a": 1}\n```\nObservation:\n',
            ("t", "multiply", '```json\n{"a": 1}\n```'),
        ),
        # The stop word on the same line; JSON over several lines.
        ('Action: m\nAction Input: {"a": 1} Observation:', ("", "m", '{"a": 1}')),
        ('Action: m\nAction Input: {\n"a": 1\n}\nObservation:', ("", "m", '{\n"a": 1\n}')),
        # What the model makes up after its own action does not count.
        (
            "Action: m\nAction Input: {}\nObservation: 7\nThought: x\nFinal Answer: 7",
            ("", "m", "{}"),
        ),
        ("Action: m\nAction Input: {}\nFinal Answer: 7", ("", "m", "{}")),
        ("Action: m\nAction Input: {}\nAction: n\nAction Input: {}", ("", "m", "{}")),
        ("Action: m\nAction Input:", ("", "m", "")),
        ("Action:\nAction Input: {}", ("", "", "{}")),
    ],
)
def test_actions_are_read(react: ModuleType, text: str, expected: tuple[str, str, str]) -> None:
    assert react.parse(text) == react.Action(*expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Thought: I know the answer now\nFinal Answer: It is 6.",
            ("I know the answer now", "It is 6."),
        ),
        ("Final Answer: two\nlines", ("", "two\nlines")),
        ("Final Answer: 6\nAction: m\nAction Input: {}", ("", "6\nAction: m\nAction Input: {}")),
        ("Hello! How can I help?", ("", "Hello! How can I help?")),
        ("Action: m and nothing else", ("", "Action: m and nothing else")),
        ("Action Input: {} without an action", ("", "Action Input: {} without an action")),
        (
            "I like the word Final Answer: in a line",
            ("", "I like the word Final Answer: in a line"),
        ),
        ("", ("", "")),
    ],
)
def test_answers_are_read(react: ModuleType, text: str, expected: tuple[str, str]) -> None:
    assert react.parse(text) == react.Answer(*expected)


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("multiply", '{"a": 17, "b": 23}', "391"),
        ("multiply", '```json\n{"a": 2, "b": 3}\n```', "6"),
        ("divide", "{}", "There is no tool 'divide'. Use one of: multiply, broken."),
        ("multiply", '{"a": 2', "not JSON"),
        ("multiply", "", "not JSON"),
        ("multiply", "[" * 100_000, "not JSON"),
        ("multiply", "[1, 2]", "must be a JSON object, not list"),
        ("multiply", '{"a": 2}', "missing: b"),
        ("multiply", '{"a": 2, "b": 3, "c": 4}', "not known: c"),
        ("multiply", '{"a": "__import__", "b": "os"}', "multiply failed: TypeError"),
        ("broken", "{}", "broken failed: RuntimeError: no network"),
    ],
)
def test_what_the_model_gets_to_see(
    react: ModuleType, tool: str, arguments: str, expected: str
) -> None:
    def fail() -> None:
        raise RuntimeError("no network")

    tools = [react.CALCULATOR, react.Tool("broken", "", {}, fail)]
    assert expected in react.observe(react.Action("", tool, arguments), tools)


def scripted(replies: list[str]) -> tuple[Callable[[str], str], list[str]]:
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return replies[len(prompts) - 1]

    return ask, prompts


def test_a_mistake_goes_back_to_the_model(react: ModuleType) -> None:
    ask, prompts = scripted(
        [
            "Thought: I multiply.\nAction: times\nAction Input: {}\nObservation:",
            'Thought: Again.\nAction: multiply\nAction Input: {"a": 2, "b": 3}\nObservation:',
            "Thought: I know the answer now\nFinal Answer: 6",
        ]
    )
    answer, steps = react.run(ask, "2 x 3?", [react.CALCULATOR])
    assert answer == "6"
    assert [step[1] for step in steps] == ["There is no tool 'times'. Use one of: multiply.", "6"]
    assert prompts[2].endswith(
        "Thought: I multiply.\nAction: times\nAction Input: {}\n"
        "Observation: There is no tool 'times'. Use one of: multiply.\n"
        'Thought: Again.\nAction: multiply\nAction Input: {"a": 2, "b": 3}\nObservation: 6'
    )


def test_turns_are_limited(react: ModuleType) -> None:
    ask, prompts = scripted(["Action: multiply\nAction Input: {}\nObservation:"] * 9)
    with pytest.raises(RuntimeError, match="after 4 turns"):
        react.run(ask, "2 x 3?", [react.CALCULATOR], max_turns=4)
    assert len(prompts) == 4


def test_with_a_model_that_has_to_be_stopped(react: ModuleType, tmp_path: Path) -> None:
    """Through `model.chat`: the first answer would make its own observation up, if let."""
    tokenizer = QWenTokenizer(write_ranks(tmp_path / "qwen.tiktoken"))
    model = Scripted(tiny_config(max_position_embeddings=4096)).eval()
    model.generation_config = GenerationConfig(
        chat_format="chatml", max_window_size=4000, eos_token_id=N_RANKS, pad_token_id=N_RANKS
    )
    first = 'Thought: t\nAction: multiply\nAction Input: {"a": 6, "b": 7}\nObservation:'
    turns = iter([first + " 13\nFinal Answer: 13", "Thought: done\nFinal Answer: 42"])
    asked: list[str] = []
    ask = react.asker(model, tokenizer, do_sample=False, max_new_tokens=200)

    def one_turn(message: str) -> Any:
        model.say(tokenizer.encode(next(turns)), N_RANKS + 2)
        said = ask(message)
        asked.append(said)
        return said

    answer, steps = react.run(one_turn, "6 x 7?", [react.CALCULATOR])
    assert asked[0] == first, "stopped at the stop word, which stays"
    assert (answer, [text for _, text in steps]) == ("42", ["42"])


def test_both_stop_words_are_needed(react: ModuleType) -> None:
    """With Qwen's own ranks: a line break behind the colon makes another token of it."""
    tokenizer = QWenTokenizer(qwen_ranks())
    alone, with_break = (tokenizer.encode(word) for word in react.STOP_WORDS)
    assert (alone, with_break) == ([37763, 367, 25], [37763, 367, 510])
