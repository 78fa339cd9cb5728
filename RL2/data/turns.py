"""Where in a rendered conversation the assistant speaks, for templates that do not mark it."""

from __future__ import annotations

from RL2.data.source import DataError
from RL2.data.template import Chat, Template, reasoning_of

Piece = tuple[str, bool]
"""Text, and whether it is trained on."""


def cut_at_turns(template: Template, chat: Chat, turns: list[int]) -> tuple[list[Piece], int]:
    """Return the conversation up to the end of its last turn, cut where training on `turns` begins and ends.

    Also return how many of them do not train, because the template writes them otherwise once others follow them.
    Raise DataError if the last turn does not begin where the prompt for it ends, or if something said is left out.
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
    """Return the rendered text up to message `number` of the assistant, and that text with the message."""
    message = chat.messages[number]
    prompt = template.render(chat, number, add_generation_prompt=True) if number else ""
    text = template.render(chat, number + 1)
    opened, mark, rest = prompt.rpartition("<think>")
    if mark and not rest.strip() and text.startswith(opened) and not text.startswith(prompt):
        reasoning, said = reasoning_of(message).strip(), text[len(opened) :]
        if said.startswith(mark):  # opened in another way, such as without a newline (Nemotron 3)
            text = prompt + said.removeprefix(mark).lstrip("\n")
        elif reasoning:  # opened for the model, and dropped from what the model said (DeepSeek R1)
            text = f"{prompt}{reasoning}\n</think>\n\n{said.lstrip(chr(10))}"
        else:
            raise DataError(
                "the chat template lets every answer begin with reasoning, and this one has none; add it as "
                "'reasoning_content', or take another template (actor.chat_template)"
            )
    if not text.startswith(prompt):
        raise DataError(
            f"the chat template breaks the prefix property: what it writes for messages[{number}] does not begin where "
            "the prompt for it ends; take another template (actor.chat_template), give it other arguments "
            "(actor.chat_template_kwargs), or {% generation %} marks around what the assistant says"
        )
    template.refuse_lost(message, text[len(prompt) :])
    return prompt, text


def _within(template: Template, chat: Chat, number: int, whole: str) -> tuple[int, int] | None:
    """Return where message `number` stands in `whole`; None if the template renders it differently there."""
    prompt, text = _turn(template, chat, number)
    end = template.end_of_turn(text, len(prompt))
    if not whole.startswith(text[:end]):
        return None
    if not text[:end].endswith(template.ends):
        end += next((len(token) for token in template.ends if whole.startswith(token, end)), 0)
    return len(prompt), end
