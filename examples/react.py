"""Function calling with original Qwen in ReAct form: the prompt, the parser, and the loop.

Original Qwen's chat models were taught to call functions as text (ReAct, Yao et al. 2022): the
prompt lists the tools, the model writes `Thought:`, `Action:` (a tool's name), `Action Input:` (its
arguments in JSON), and stops where the `Observation:` begins that only the caller can know. The
caller runs the tool, writes the observation behind it, and lets the model go on, until it writes
`Final Answer:`. Qwen2.5 and later have a tool format of their own in their chat templates
(`apply_chat_template(..., tools=...)`); this page is for the original.

Two stop sequences are needed, since the tokenizer has one token for ":\\n": the end of
"Observation:" has other ids when a line break follows.

Nothing of a model's text is executed. Arguments have to be a JSON object; whatever is not as it
should be (no such tool, broken JSON, missing arguments, a tool that fails) goes back to the model
as the observation, so that it can mend it, and the number of turns is limited.

    python examples/react.py Qwen-7B-Chat-Int4 "What is 17 times 23?"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STOP_WORDS = ("Observation:", "Observation:\n")
_ACTION, _INPUT = "\nAction:", "\nAction Input:"
_OBSERVATION, _FINAL = "\nObservation:", "\nFinal Answer:"


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
        name: what the model writes after `Action:`; one word.
        description: what it does, for the model.
        parameters: JSON Schema of its arguments (`{"type": "object", "properties": ...}`).
        call: gets the arguments as keywords; what it returns is shown to the model as text.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[..., Any]


@dataclass(frozen=True)
class Action:
    """The model asks for a tool. `arguments` is what it wrote, not yet parsed."""

    thought: str
    tool: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """The model is done; `text` is for the user."""

    thought: str
    text: str


def react_prompt(query: str, tools: Iterable[Tool]) -> str:
    """The message to send as the user's, for the first turn.

    Raises:
        ValueError: no tool, two of one name, or a name that could not be read back.
    """
    tools = list(tools)
    names = [tool.name for tool in tools]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tools: expected at least one, each with a name of its own, got {names}")
    for name in names:
        if not name or name != "".join(name.split()):
            raise ValueError(f"tool name: expected one word, got {name!r}")
    listed = "\n\n".join(
        f"{tool.name}: {tool.description} Parameters: "
        f"{json.dumps(tool.parameters, ensure_ascii=False)} Write the arguments as a JSON object."
        for tool in tools
    )
    return (
        "Answer the question at the end as well as you can. These tools are there to help:\n\n"
        f"{listed}\n\n"
        "Write in this form:\n\n"
        "Question: the question that is to be answered\n"
        "Thought: what you think should be done next\n"
        f"Action: the tool to use, one of [{', '.join(names)}]\n"
        "Action Input: the arguments for it\n"
        "Observation: what the tool gave back\n"
        "... (Thought, Action, Action Input and Observation may be repeated)\n"
        "Thought: I know the answer now\n"
        "Final Answer: the answer to the question\n\n"
        "Begin.\n\n"
        f"Question: {query.strip()}"
    )


def parse(text: str) -> Action | Answer:
    """What the model's newest text asks for.

    The first action counts: whatever follows its `Observation:` was made up by the model. A final
    answer counts where it stands before any action. Text in neither form is an answer as a whole,
    since that is how chat models answer what needs no tool.
    """
    text = "\n" + text.strip()
    action, final = text.find(_ACTION), text.find(_FINAL)
    given = text.find(_INPUT, action + 1) if action >= 0 else -1
    if given >= 0 and not 0 <= final < action:
        name = text[action + len(_ACTION) : given].strip()
        rest = text[given + len(_INPUT) :]
        for end in (_OBSERVATION, _FINAL, _ACTION, "\nThought:"):
            rest = rest.partition(end)[0]
        # A stop at "Observation:" leaves the word behind, on the same line in some models' texts.
        rest = rest.strip().removesuffix("Observation:").strip()
        return Action(_thought(text[:action]), name, rest)
    if final >= 0:
        answer = text[final + len(_FINAL) :].partition(_OBSERVATION)[0].strip()
        return Answer(_thought(text[:final]), answer)
    return Answer("", text.partition(_OBSERVATION)[0].strip())


def _thought(text: str) -> str:
    """What stands after the last `Thought:`, or all of it."""
    return text.rpartition("Thought:")[2].strip()


def observe(action: Action, tools: Iterable[Tool]) -> str:
    """Run the tool that was asked for; what it gave, or what was wrong, as text for the model."""
    by_name = {tool.name: tool for tool in tools}
    tool = by_name.get(action.tool)
    if tool is None:
        return f"There is no tool {action.tool!r}. Use one of: {', '.join(by_name)}."
    try:
        arguments = json.loads(_unfenced(action.arguments))
    except (ValueError, RecursionError) as error:
        return f"The arguments are not JSON ({error}). Write one JSON object."
    if not isinstance(arguments, dict):
        return f"The arguments must be a JSON object, not {type(arguments).__name__}."
    missing = [key for key in tool.parameters.get("required", ()) if key not in arguments]
    known = tool.parameters.get("properties", {})
    unknown = [key for key in arguments if key not in known]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"not known: {', '.join(unknown)}"] if unknown else []
        return f"The arguments of {tool.name} are wrong ({'; '.join(parts)})."
    try:
        return str(tool.call(**arguments))
    except Exception as error:  # whatever a tool raises is something the model may react to
        return f"{tool.name} failed: {type(error).__name__}: {error}"


def _unfenced(text: str) -> str:
    """The inside of a Markdown code fence, which models like to put around JSON."""
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text.partition("\n")[2].removesuffix("```")
    return text


def run(
    ask: Callable[[str], str], query: str, tools: Iterable[Tool], *, max_turns: int = 5
) -> tuple[str, list[tuple[Action, str]]]:
    """Let the model use tools until it answers.

    Args:
        ask: gets the whole user message, gives the model's text up to a stop word.
        query: the user's question.
        tools: what the model may use.
        max_turns: how often the model is asked at the most.

    Returns:
        The answer, and each action with its observation.

    Raises:
        RuntimeError: no answer after `max_turns`.
    """
    tools = list(tools)
    prompt = react_prompt(query, tools)
    steps: list[tuple[Action, str]] = []
    for _ in range(max_turns):
        said = ask(prompt)
        found = parse(said)
        if isinstance(found, Answer):
            return found.text, steps
        observation = observe(found, tools)
        steps.append((found, observation))
        prompt += (
            f"\nThought: {found.thought}\nAction: {found.tool}\n"
            f"Action Input: {found.arguments}\nObservation: {observation}"
        )
    raise RuntimeError(f"no final answer after {max_turns} turns")


def asker(model: Any, tokenizer: Any, **options: Any) -> Callable[[str], str]:
    """`ask` for `run`, by `model.chat` of an original Qwen."""
    stop = [tokenizer.encode(word) for word in STOP_WORDS]

    def ask(message: str) -> str:
        response, _ = model.chat(tokenizer, message, stop_words_ids=stop, **options)
        return str(response)

    return ask


def multiply(a: float, b: float) -> float:
    return a * b


CALCULATOR = Tool(
    "multiply",
    "Multiplies two numbers.",
    {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
    },
    multiply,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="an original Qwen chat model, quantized or not")
    parser.add_argument("query")
    parser.add_argument("--max-turns", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()

    import qquant

    model, tokenizer, _ = qquant.load(options.directory)
    ask = asker(model, tokenizer, do_sample=False)
    answer, steps = run(ask, options.query, [CALCULATOR], max_turns=options.max_turns)
    for action, observation in steps:
        print(f"{action.tool}({action.arguments}) -> {observation}")
    print(answer)


if __name__ == "__main__":
    main()
