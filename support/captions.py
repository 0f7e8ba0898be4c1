"""Captions: a text as the numbers of its words, for a model that was trained on them, and back.

Word 0 is the padding after a shorter caption. The empty caption, which asks for anything, is the null condition of
guidance: the number after the last word's, at every place.
"""

from collections.abc import Iterable, Sequence

from support.errors import UserError


def parse_caption(text: str, words: Sequence[str], length: int) -> list[int]:
    """A text's `length` word numbers; capital letters count as small ones, and several blanks as one.

    Args:
        words: all that are known; words[0] stands for the padding, and cannot be asked for.

    Raises:
        UserError: for a word that is not known, or too many of them.
    """
    asked = text.lower().split()
    if not asked:
        return [len(words)] * length
    for word in asked:
        if word not in words[1:]:
            raise UserError(f"the word {word!r} of the caption {text!r} is not one of {', '.join(words[1:])}")
    if len(asked) > length:
        raise UserError(f"the caption {text!r} has {len(asked)} words; give at most {length}")
    return [words.index(word) for word in asked] + [0] * (length - len(asked))


def caption_text(caption: Iterable[int], words: Sequence[str]) -> str:
    """The text of a caption (L,), without padding; "" of the null caption."""
    return " ".join(words[number] for number in caption if 0 < number < len(words))
