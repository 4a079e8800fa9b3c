"""Which characters of a rendered conversation the assistant wrote: exact, for any template.

Templates in use do not mark the assistant's words (``{% generation %}``), and they strip, move
and rewrite what they are given. So a conversation is rendered twice: as it is, and with every
answer replaced by a sentinel. What the second rendering holds between the sentinels (the *walls*)
stands in the first one as well, and what lies between the walls is the assistant's: from the end
of what a generation prompt writes to the control token that ends an answer, this included. If
the walls are not found there, the conversation is refused: a mask is exact or it is not made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dh_jax.data.reading.records import Fault
from dh_jax.data.text.conversations import Message, parse_conversation
from dh_jax.data.text.offsets import Located
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError, DataError

# Unicode keeps these for a program's own use; they are no characters of any text.
_SENTINEL = re.compile("\ufdd0([0-9]+)\ufdd1")
_LITERAL, _LITERAL_END = "\ufdd2", "\ufdd3"
_MARKS = re.compile("[\ufdd2\ufdd3]")
_RESERVED = "\ufdd0\ufdd1\ufdd2\ufdd3"


class Frame(NamedTuple):
    """What a template writes around an answer; learnt from a conversation made up for it."""

    header: str  # the end of a generation prompt, e.g. "<|im_start|>assistant\n"
    openings: tuple[str, ...]  # written for the assistant after it, e.g. "<think>\n\n</think>\n\n"
    stop: re.Pattern[str]  # the control token that ends an answer, e.g. "<|im_end|>"
    control: re.Pattern[str]  # any control token
    variables: Mapping[str, Any]  # of the template


class Rendered(NamedTuple):
    """A rendered conversation and its A answers, each with its stop token."""

    text: str  # control tokens that a message spells out stand between U+FDD2 and U+FDD3
    answers_A2: list[tuple[int, int]]  # first character, one past the last
    whole: bool  # False: the template left out some of what it was given


def learn_frame(tokenizer: TokenizerWrapper, variables: Mapping[str, Any]) -> Frame:
    """What the tokenizer's template writes around answers.

    Raises:
        ConfigError: there is no template, it does not render, it writes today's date, or it ends
            answers with no control token, so that nothing would teach a model to stop.
    """
    render = tokenizer.render_chat
    control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
    user, answers = {"role": "user", "content": "\ufdd0u\ufdd1"}, [_answer(0), _answer(1)]

    def parts(messages: list[Message], prompt: bool = False) -> list[str]:
        text = render(messages, add_generation_prompt=prompt, **variables)
        return re.split("\ufdd0.\ufdd1", text)

    try:
        _, end = parts([user])
        _, prompt = parts([user], prompt=True)
        _, first, between, second, last = parts([user, answers[0], user, answers[1]])
    except ConfigError:
        raise
    except ValueError as error:  # it refuses, or leaves out or repeats a turn
        cure = "take another tokenizer, or set text.conversation.variables"
        if "strftime_now" in (tokenizer.chat_template or ""):
            cure = (
                "if it asks for today's date, which would make the tokens differ from day to "
                "day, give one: text.conversation.variables: {date_string: '26 Jul 2024'}"
            )
        raise ConfigError(
            f"the chat template does not render a plain conversation ({error}); {cure}"
        ) from error
    # A prompt may begin the answer as well ("<think>"), or be less than stands before answers. A
    # template that prompts whether asked to or not, or never, has all that in front of answers.
    full = prompt if prompt != end and first.startswith(prompt) else first
    if prompt != end and not prompt.startswith(full):
        raise ConfigError(
            f"the chat template opens an answer with {first!r} but prompts for one with "
            f"{prompt!r}, so where answers begin is not known; take another template"
        )
    after_user = len(end)
    if prompt == end:  # then the user's turn ends behind its control token
        found = control.search(full)
        after_user = found.end() if found else 0
    header = full[after_user:] or full
    openings = {
        piece[len(full) :]
        for piece in (first, second)
        if piece.startswith(full) and not prompt.startswith(piece)
    }
    stops = [control.search(piece) for piece in (between, last)]
    if stops[0] is None or stops[1] is None or stops[0].group() != stops[1].group():
        raise ConfigError(
            f"the chat template ends an answer with {last!r}, which is no control token of the "
            "tokenizer, so a model would not learn to stop; take another template or tokenizer"
        )
    stop = re.compile(f"{re.escape(stops[0].group())}(?!{_LITERAL_END})")
    ordered = tuple(sorted(openings, key=len, reverse=True))
    return Frame(header, ordered, stop, control, variables)


def _answer(number: int) -> Message:
    return {"role": "assistant", "content": f"\ufdd0{number}\ufdd1"}


def render_conversation(tokenizer: TokenizerWrapper, frame: Frame, document: str) -> Rendered:
    """Render a conversation and find its answers.

    Args:
        tokenizer: whose chat template renders it.
        frame: of that template.
        document: canonical JSON; see `conversations.read_conversation`.

    Raises:
        Fault: the template refuses the conversation (``template_refuses``), or writes it in a
            way in which answers cannot be told from the rest (``answers_not_found``).
    """
    if not document.isascii() and any(mark in document for mark in _RESERVED):
        raise Fault("not_text", "U+FDD0 to U+FDD3 are no characters of a text")
    marked = frame.control.sub(f"{_LITERAL}\\g<0>{_LITERAL_END}", document)
    messages, tools = parse_conversation(marked)
    blank = [
        _answer(i) if message["role"] == "assistant" else message
        for i, message in enumerate(messages)
    ]
    try:
        text, walled = (
            tokenizer.render_chat(each, tools, **frame.variables) for each in (messages, blank)
        )
    except DataError as error:
        raise Fault("template_refuses", str(error)) from error
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if _SENTINEL.findall(walled) != list(map(str, numbers)):
        raise Fault("answers_not_found", "the chat template leaves out or moves an answer")
    walls = _walls(walled, frame)
    spans = _between(text, walls, frame.stop)
    whole, answered = True, 0
    for message in messages:
        if message["role"] == "assistant":
            whole = whole and _complete(text, spans[answered], message)
            answered += 1
        else:
            content = message["content"]  # mostly near: in the wall, not only in the text
            whole = whole and (content in walls[answered] or _repeats(text, content.strip()))
    if tools and walled == tokenizer.render_chat(blank, **frame.variables):
        whole = False  # the template knows of no tools
    return Rendered(text, spans, whole)


def _walls(walled: str, frame: Frame) -> list[str]:
    """What is not the assistant's: before, between and after its answers."""
    pieces = _SENTINEL.split(walled)[::2]
    walls = []
    for i, piece in enumerate(pieces):
        start, end = 0, len(piece)
        if i > 0:  # the rest of the answer before it: up to the stop token
            stop = frame.stop.search(piece)
            if stop is None:
                raise Fault("answers_not_found", "the chat template ends an answer without stop")
            start = stop.end()
        if i < len(pieces) - 1:  # the beginning of the answer after it
            opened = [o for o in frame.openings if piece.endswith(frame.header + o)]
            end -= len(opened[0]) if opened else 0
        walls.append(piece[start:end])
    return walls


def _between(text: str, walls: list[str], stop: re.Pattern[str]) -> list[tuple[int, int]]:
    """Where the answers are: what lies between the walls, which must be all the rest.

    No answer holds the stop token (one that spells it out is marked), so each ends at the first.
    """
    spans = []
    position = len(walls[0])
    found = text.startswith(walls[0])
    for wall in walls[1:]:
        match = stop.search(text, position)
        if not found or match is None:
            break
        spans.append((position, match.end()))
        found = text.startswith(wall, match.end())
        position = match.end() + len(wall)
    if not found or len(spans) != len(walls) - 1 or position != len(text):
        raise Fault(
            "answers_not_found",
            "what the chat template writes around the answers depends on what is in them",
        )
    return spans


def _complete(text: str, span: tuple[int, int], message: Message) -> bool:
    """Whether an answer as written has all that its message has, but for white space."""
    content = message["content"] or ""
    if len(message) == 2 and text.startswith(content, *span):  # role and content alone
        return True
    squeezed = "".join(text[span[0] : span[1]].split())
    parts = [content, message.get("reasoning_content")]
    parts += [(call.get("function") or call).get("name") for call in message.get("tool_calls", ())]
    return all("".join(part.split()) in squeezed for part in parts if isinstance(part, str))


def _repeats(text: str, content: str) -> bool:
    """Whether a rendered conversation has a turn's content, also as a JSON string in a tool's."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def encode_conversations(tokenizer: TokenizerWrapper, texts: list[str]) -> list[Located]:
    """Encode many `Rendered.text` together, on all cores. What stands between marks is encoded
    as text; positions are those in the text with its marks."""
    plain = [text for text in texts if text.isascii() or _LITERAL not in text]
    located = iter(tokenizer.encode_located(plain, rendered=True))
    return [
        next(located) if text.isascii() or _LITERAL not in text else _encode_marked(tokenizer, text)
        for text in texts
    ]


def _encode_marked(tokenizer: TokenizerWrapper, text: str) -> Located:
    parts = []
    position = 0
    for i, piece in enumerate(_MARKS.split(text)):
        ids, starts, ends = tokenizer.encode_located([piece], rendered=i % 2 == 0)[0]
        parts.append((ids, starts + position, ends + position))
        position += len(piece) + 1
    return Located(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def answer_mask(
    located: Located, answers_A2: list[tuple[int, int]]
) -> tuple[npt.NDArray[np.bool_], list[int]]:
    """Which tokens have a character of an answer.

    Returns:
        ``[n]``, and one past the last token of every answer.
    """
    bounds_A2 = np.array(answers_A2, np.int64).reshape(-1, 2)
    firsts = located.ends_n.searchsorted(bounds_A2[:, 0], side="right").tolist()
    ends = located.starts_n.searchsorted(bounds_A2[:, 1], side="left").tolist()
    mask_n = np.zeros(located.ids.size, np.bool_)
    for first, end in zip(firsts, ends, strict=True):
        mask_n[first:end] = True
    return mask_n, ends
