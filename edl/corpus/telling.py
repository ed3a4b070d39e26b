"""Words that tell one group of documents from the others, so that a person can name it."""

import collections
import re
from collections.abc import Iterable, Iterator
from typing import Any

from edl.command_line import printable
from edl.corpus.extras import require

_LETTERS = re.compile(r"[^\W\d_]+")
# Scripts that do not part words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_UNPARTED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LONGEST = 24  # letters of what is still a word


def telling_words(texts: Iterable[str], groups: Any, number: int, max_characters: int, count: int = 12) -> list[Any]:
    """Of each of the groups, the words that its documents have more often than the other documents.

    By the lower end of the 95 % interval of the logarithm of the odds ratio (Haldane and Anscombe: 1/2 is added to each
    of the four numbers of documents). Of scripts that do not part words, pairs of letters are taken.

    Args:
        texts: N documents, of which the first `max_characters` count.
        groups: array [N], the group of each.
        number: how many groups there are.
        max_characters (int): as of `Features`.
        count: how many words of each group at most.

    Returns:
        list of lists of words, the most telling first.
    """
    np = require("numpy")
    having = [collections.Counter[str]() for _ in range(number)]
    for text, group in zip(texts, groups):
        having[group].update(set(_words(text[:max_characters].lower())))
    everywhere = sum(having, collections.Counter())
    sizes = np.bincount(groups, minlength=number)
    result = []
    for group, own in enumerate(having):
        words = sorted(word for word, times in own.items() if times > 1)
        inside = np.array([own[word] for word in words], np.float64)
        outside = np.array([everywhere[word] for word in words], np.float64) - inside
        table = [inside, sizes[group] - inside, outside, sizes.sum() - sizes[group] - outside]
        a, b, c, d = (cell + 0.5 for cell in table)
        scores = np.log(a * d / (b * c)) - 1.96 * np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
        order = np.argsort(-scores, kind="stable")[:count]
        result.append([words[place] for place in order if scores[place] > 0])
    return result


def _words(text: str) -> Iterator[str]:
    for letters in _LETTERS.findall(text):
        if _UNPARTED.search(letters):
            yield from (letters[begin : begin + 2] for begin in range(len(letters) - 1))
        elif 1 < len(letters) <= _LONGEST:
            yield letters


def beginning(text: str, length: int = 80) -> str:
    """The first characters on one line, without what a terminal would obey."""
    shown = printable(" ".join(text[: 4 * length].split()))
    return shown if len(shown) <= length else shown[: length - 1] + "…"
