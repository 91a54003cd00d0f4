"""Rows that hold a conversation, as chat and instruction data sets do: the last reply is the answer.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}    OpenAI, TRL
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}        ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                                          Alpaca
    {"instruction": ..., "context": ..., "response": ...}                                      Dolly

What was said before the last reply, by whomever, becomes the question, a line per turn. System prompts are left out:
they are the same for all rows, and rows that share a question would all come to one side. An instruction keeps its
input or context, on a line of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbr_dist.data.row_values import parsed

CONVERSATIONS = ("messages", "conversations", "conversation")
INPUTS = ("input", "context")
"""Fields with what an instruction is about."""
REPLY = ("assistant", "gpt", "model", "bot", "chatgpt")
SYSTEM = ("system", "developer")
CALLS = ("tool_calls", "function_call")
"""A turn with one of these and no content says nothing: it calls a tool."""


def unfold(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its conversation, or instruction and input, as `question` and `answer`; any other row as it is.

    Raises:
        ValueError: the conversation has another form, or no reply to anything.
    """
    for name in CONVERSATIONS:
        if name in row and "question" not in row:
            question, answer = _pair(name, row[name])
            return {**{key: value for key, value in row.items() if key != name}, "question": question, "answer": answer}
    for name in INPUTS:
        more = row.get(name)
        if isinstance(more, str) and more and isinstance(row.get("instruction"), str):
            return {**{key: value for key, value in row.items() if key != name},
                    "instruction": f"{row['instruction']}\n{more}"}  # fmt: skip
    return row


def _pair(name: str, turns: Any) -> tuple[str, str]:
    turns = parsed(turns)
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{name} is not a list of turns")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, 1):
        role, text = _turn(turn)
        if role is not None and text is None and any(turn.get(call) for call in CALLS):
            continue
        if role is None or not isinstance(text, str):
            raise ValueError(f"{name}, turn {number}: not an object with role and content (text), or from and value")
        if role.lower() not in SYSTEM:
            said.append((role.lower(), text))
    last = max((at for at, (role, _) in enumerate(said) if role in REPLY), default=0)
    if not last:
        raise ValueError(f"{name}: no reply ({', '.join(REPLY)}) to anything")
    return "\n".join(text for _, text in said[:last]), said[last][1]


def _turn(turn: Any) -> tuple[str | None, Any]:
    if isinstance(turn, Mapping):
        for who, what in (("role", "content"), ("from", "value")):
            if isinstance(turn.get(who), str):
                return turn[who], _joined(turn.get(what))
    return None, None


def _joined(content: Any) -> Any:
    """The text of a content in parts, `[{"type": "text", "text": ...}, ...]`; one with others (images) as it is."""
    if not isinstance(content, list | tuple):
        return content
    texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else content
