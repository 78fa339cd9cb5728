"""Location of the assistant's turns in a rendered conversation, for templates that do not mark them."""

from __future__ import annotations

from RL2.data.source import DataError
from RL2.data.template import Chat, Template, reasoning_of

Piece = tuple[str, bool]
"""A text and whether it trains."""


def cut_at_turns(template: Template, chat: Chat, turns: list[int]) -> tuple[list[Piece], int]:
    """Return the conversation up to the end of its last turn, split where training on `turns` begins and ends.

    Also return the number of turns that do not train because the template renders them differently once others follow.
    Raise DataError if the last turn does not begin where its prompt ends, or if part of a message is left out.
    """
    last = len(chat.messages) - 1
    prompt, text = _turn(template, chat, last)
    end = template.end_of_turn(text, len(prompt))
    whole = text[:end]
    if not whole.endswith(template.ends):  # the next turn's first token ends this one
        whole += template.call_end if chat.messages[last].get("tool_calls") else template.end
    template.refuse_lost_around(chat, whole)

    spans, lost = list[tuple[int, int]](), 0
    for number in turns:
        if number == last:
            spans.append((len(prompt), len(whole)))
        elif (span := _within(template, chat, number, whole)) and (not spans or spans[-1][1] <= span[0]):
            spans.append(span)
        else:
            lost += 1
    found, at = list[Piece](), 0
    for start, end in spans:
        found += [(whole[at:start], False), (whole[start:end], True)]
        at = end
    return [*found, (whole[at:], False)] if at < len(whole) else found, lost


def _turn(template: Template, chat: Chat, number: int) -> tuple[str, str]:
    """Return the rendered prompt of the assistant's message `number`, and the text that includes the message."""
    message = chat.messages[number]
    prompt = template.render(chat, number, add_generation_prompt=True) if number else ""
    text = template.render(chat, number + 1)
    opened, mark, rest = prompt.rpartition("<think>")
    if mark and not rest.strip() and text.startswith(opened) and not text.startswith(prompt):
        reasoning, answer = reasoning_of(message).strip(), text[len(opened) :]
        if answer.startswith(mark):  # opened differently, such as without a newline (Nemotron 3)
            text = prompt + answer.removeprefix(mark).lstrip("\n")
        elif reasoning:  # the prompt opens it, and the template drops it from the answer (DeepSeek R1)
            text = f"{prompt}{reasoning}\n</think>\n\n{answer.lstrip(chr(10))}"
        else:
            raise DataError(
                "the chat template begins each answer with reasoning, and this one has none; add it as "
                "'reasoning_content', or choose another template (actor.chat_template)"
            )
    if not text.startswith(prompt):
        raise DataError(
            f"the chat template breaks the prefix property: the text of messages[{number}] does not begin where "
            "its prompt ends; choose another template (actor.chat_template), give it other arguments "
            "(actor.chat_template_kwargs), or {% generation %} marks around the assistant's text"
        )
    template.refuse_lost(message, text[len(prompt) :])
    return prompt, text


def _within(template: Template, chat: Chat, number: int, whole: str) -> tuple[int, int] | None:
    """Return start and end of message `number` in `whole`; None if the template renders it differently there."""
    prompt, text = _turn(template, chat, number)
    end = template.end_of_turn(text, len(prompt))
    if not whole.startswith(text[:end]):
        return None
    if not text[:end].endswith(template.ends):
        end += next((len(token) for token in template.ends if whole.startswith(token, end)), 0)
    return len(prompt), end
