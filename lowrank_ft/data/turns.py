"""Where the turns of a chat begin and end in a tokenizer's own template, found by rendering chats of known words.

    begin, a user's words, to_assistant, a reply, to_user, a user's words, to_assistant, ...

So a model can write both sides of a chat: what stands between the words is the template's, the words are its own.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lowrank_ft.errors import DataError, first_line

# Words that no template holds and none rewrites, and ways in which words can begin.
_WORDS = ("Xqfirstqx", "Xqsecondqx", "Xqthirdqx")
_BEGINNINGS = ("What is", "how", "7 + 5", "Please", "I am", "(a)", '"Yes"', "def f")


class NoTurnsError(DataError):
    """A tokenizer whose template does not show where turns begin and end; the message is the reason."""


@dataclass(frozen=True)
class Turns:
    """Token ids of what a template puts around the words of a chat.

    Attributes:
        begin: before the first words of the user: begin-of-text token, system prompt, beginning of the turn.
        to_assistant: from the end of the user's words to the beginning of the reply.
        to_user: from the end of a reply to the next words of the user.
    """

    begin: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]


def find_turns(tokenizer: Any) -> Turns:
    """The turns of the tokenizer's chat template.

    Raises:
        NoTurnsError: there is no template, it has no generation prompt, it rewrites or refuses such chats, or a turn
            does not end with a token of its own, so that its end could not be told from its words.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise NoTurnsError("the tokenizer has no chat template")
    first, reply, second = _WORDS
    question = [{"role": "user", "content": first}]
    chat = [*question, {"role": "assistant", "content": reply}, {"role": "user", "content": second}]
    try:
        asked, whole = (tokenizer.apply_chat_template(c, tokenize=False) for c in (question, chat))
        prompted = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # what a template raises, or jinja about it
        raise NoTurnsError(f"the chat template refuses a chat ({first_line(error)})") from error
    if prompted == asked:
        raise NoTurnsError("the chat template has no generation prompt")
    if [whole.count(w) for w in _WORDS] != [1, 1, 1] or prompted.count(first) != 1:
        raise NoTurnsError("the chat template changes a user's words")
    begin, rest = whole.split(first)
    to_user = rest.partition(reply)[2].partition(second)[0]
    begin_asked, to_assistant = prompted.split(first)
    if begin_asked != begin or not to_user:
        raise NoTurnsError("where a user's turn begins in the chat template cannot be found")
    turns = Turns(*(_settled(text, tokenizer) for text in (begin, to_assistant, to_user)))
    for name, ids in (("a user's turn", turns.to_assistant), ("a reply", turns.to_user)):
        if not ids or ids[0] not in tokenizer.added_tokens_decoder:
            raise NoTurnsError(f"in the chat template {name} does not end with a token of its own")
    if not turns.begin:
        raise NoTurnsError("the chat template puts nothing before a user's words")
    return turns


def _settled(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The ids of ``text`` that are the same whatever follows: its last characters may join the first of the words."""
    continued = [tokenizer(text + words, add_special_tokens=False, verbose=False)["input_ids"] for words in _BEGINNINGS]
    # Not strict: the words have different lengths, and what is the same in all ends before the shortest does.
    return tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*continued, strict=False)))
