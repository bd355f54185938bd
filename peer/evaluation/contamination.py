"""Which benchmark problems occur in the training rows: the same text, or 13 words in a row in common.

As for GPT-3 (Brown et al., arXiv:2005.14165, appendix C): word 13-grams, lower case, without punctuation; those that
occur in more than ten training rows are common phrases, such as the instructions that all prompts begin with, and tell
nothing. Text is the same if it is so without differences in case, width of characters, and white space.

Memory holds 8 bytes of a hash for each of the benchmark's n-grams; training rows pass by, one at a time.
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hivegrpo.peer.learn.messages import Prompt

WORDS = 13
COMMON = 10
"""Training rows in which an n-gram may occur, before it is a common phrase."""
WORD = re.compile(r"\w+")
MOST_MARKS = 32
"""Of combining marks in a row. Normalisation sorts them by insertion, so its time grows by the square of their number,
and it cannot be interrupted. Unicode's own bound for text in streams is 30 (UAX #15, section 13)."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """What was found. Problems are named by their place in the benchmark."""

    training_rows: int
    exact: tuple[int, ...]
    """Those whose whole prompt is a training prompt."""
    overlapping: tuple[int, ...]
    """Those that share 13 words in a row with one."""
    short: int
    """Problems of fewer words, which only the whole prompt could be compared of."""
    common: int
    """N-grams of the benchmark that were left out because they are common."""

    @property
    def found(self) -> frozenset[int]:
        """Problems that occur in the training rows, either way."""
        return frozenset((*self.exact, *self.overlapping))


def find_contamination(problems: Sequence[Prompt], training: Iterable[Prompt]) -> Contamination:
    """Compare a benchmark's prompts with the training's, which are gone through once."""
    whole: dict[int, list[int]] = {}
    grams = [array("Q", ngrams(text_of(prompt))) for prompt in problems]
    for place, prompt in enumerate(problems):
        whole.setdefault(_hash(normalised(text_of(prompt))), []).append(place)
    seen = {gram: 0 for each in grams for gram in each}
    exact: set[int] = set()
    rows = 0
    for prompt in training:
        rows += 1
        text = text_of(prompt)
        exact.update(whole.get(_hash(normalised(text)), ()))
        for gram in set(ngrams(text)) if seen else ():
            if gram in seen:
                seen[gram] += 1
    return Contamination(
        training_rows=rows,
        exact=tuple(sorted(exact)),
        overlapping=tuple(place for place, each in enumerate(grams) if any(0 < seen[gram] <= COMMON for gram in each)),
        short=sum(not each for each in grams),
        common=sum(count > COMMON for count in seen.values()),
    )


def text_of(prompt: Prompt) -> str:
    """What is compared: the prompt, or its messages without the system's."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")


def normalised(text: str) -> str:
    """The text without differences in case, width of characters (NFKC), and white space. Punctuation stays: it tells
    12-34 from 12+34. Of combining marks in a row, the first 32 count."""
    return " ".join(unicodedata.normalize("NFKC", _few_marks(text)).casefold().split())


def ngrams(text: str) -> Iterator[int]:
    """Hashes of all 13 words in a row; none if there are fewer."""
    words = WORD.findall(normalised(text))
    return (_hash(" ".join(words[start : start + WORDS])) for start in range(len(words) - WORDS + 1))


def _few_marks(text: str) -> str:
    if text.isascii():
        return text
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if _is_mark(character) else 0
        if marks <= MOST_MARKS:
            kept.append(character)
    return "".join(kept)


@lru_cache(maxsize=1 << 12)
def _is_mark(character: str) -> bool:
    """Whether it is nothing but combining marks, once it is taken apart: U+0F73 and U+FF9E, which are none, are."""
    return all(map(unicodedata.combining, unicodedata.normalize("NFKD", character)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
