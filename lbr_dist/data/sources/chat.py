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
from functools import lru_cache
from typing import Any

from lbr_dist.data.sources.field_names import MOST_FORMS
from lbr_dist.data.sources.row_values import blank, parsed

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
    names = _names(tuple(row))
    for name in CONVERSATIONS:
        if name in names and "question" not in names:
            if names[name] != name and not isinstance(parsed(row[names[name]]), list | tuple):
                continue  # Messages: 12
            question, answer = _pair(names[name], row[names[name]])
            return {**_without(row, names[name]), "question": question, "answer": answer}
    if "instruction" not in names:
        return row
    told = row[names["instruction"]]
    for name in INPUTS:
        more = row[names[name]] if name in names else None
        if isinstance(more, str) and not blank(more) and (isinstance(told, str) or blank(told)):
            asked = more if blank(told) else f"{told}\n{more}"
            return {**_without(row, names[name]), names["instruction"]: asked}
    return row


@lru_cache(MOST_FORMS)
def _names(fields: tuple[str, ...]) -> dict[str, str]:
    """The fields by their names in small letters; the first of two, but one that is in small letters before all."""
    return {**{str(name).lower(): name for name in reversed(fields)}, **{name: name for name in fields}}


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _pair(name: str, turns: Any) -> tuple[str, str]:
    turns = parsed(turns)
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{name} is not a list of turns")
    said: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, 1):
        role, text = _turn(turn)
        if role is not None and blank(text) and any(turn.get(call) for call in CALLS):
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
