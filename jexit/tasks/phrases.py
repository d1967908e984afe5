"""Finds and compares answers that are words, such as a place, yes or no, in free text.

Every function accepts any text and takes time that is linear in the length of the text. The
candidates map each phrase that counts as an answer to the answer that the phrase stands for. A
phrase that maps to None, such as "no one", only prevents a shorter match ("no") inside it.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from jexit.tasks.answers import visible_text
from jexit.tasks.base import VerdictKind

MARKER = "####"
ARTICLES = frozenset(("the", "a", "an"))
# The phrases with None contain a "no" that is not an answer.
YES_NO: Mapping[str, str | None] = {
    "yes": "yes",
    "no": "no",
    **dict.fromkeys(("no one", "no longer", "no matter", "no doubt", "no other"), None),
}

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_SENTENCE_ENDS = frozenset(".!?;:\n")
_TOKEN = re.compile(rf"{_WORD.pattern}|[.!?;:\n]")

Candidates = Mapping[str, str | None]
_Spelled = Mapping[tuple[str, ...], str | None]  # candidates by their words

_NEGATIONS = frozenset(
    ("not", "never", "cannot", "neither", "nor", "nobody", "none", "hardly", "scarcely", "unlikely")
).union(("doubt", "doubts", "false", "untrue", "without"))
_NEGATING_PAIRS = frozenset((("no", "longer"), ("no", "one")))
_BEFORE_SUBJECTS = frozenset(("that", "believe", "believes", "think", "thinks"))
# What may stand between a negation and what it denies: "is not really to be found in the box".
_BETWEEN = _BEFORE_SUBJECTS.union(
    ("am", "are", "be", "been", "being", "is", "was", "were", "did", "do", "does"),
    ("had", "has", "have", "can", "could", "will", "would"),
    ("actually", "all", "always", "at", "currently", "even", "ever", "explicitly", "fully"),
    ("necessarily", "now", "quite", "really", "still", "truly", "yet"),
    ("in", "inside", "into", "of", "on", "onto", "to"),
    ("found", "kept", "located", "moved", "placed", "put", "searched", "stored"),
    ("appear", "appears", "seem", "seems", "case", "true"),
)
# "The answer is the box.", "**Answer:** the box", and what may follow it.
_ANNOUNCED = re.compile(r"\banswer(?: is\b|[*_ ]{0,4}:)", re.IGNORECASE)
_SPAN = 400  # characters of a line or an announcement in which the answer is
_LAST = 64  # announcements and mentions that are read, counted from the end of the text
_LONGEST = 32  # the largest number of words of a candidate; longer ones are ignored
_SUBORDINATE = re.compile(
    r"\W*(?:(?:even )?though|although|while|since|because|as|after|before|when|if)\b", re.IGNORECASE
)
_REACH = 12  # the number of words before a phrase that may contain its negation


def words_of(text: str) -> tuple[str, ...]:
    """Returns the words of `text` in lower case, without articles and punctuation.

    >>> words_of("In the bookstore’s **Back Room**.")
    ('in', "bookstore's", 'back', 'room')
    """
    return tuple(word for word in _WORD.findall(_folded(text)) if word not in ARTICLES)


# A task looks for the same few phrases in every text.
_candidate_words = functools.lru_cache(maxsize=4096)(words_of)


def _folded(text: str) -> str:
    return text.replace("\u2019", "'").casefold()


@functools.lru_cache(maxsize=4)  # a text is judged by several sets of candidates
def _words_and_starts(text: str) -> tuple[tuple[str, ...], set[int]]:
    """Returns (`words_of(text)`, indices of the words that start a sentence or a clause)."""
    words: list[str] = []
    starts: set[int] = set()
    for token in _TOKEN.findall(_folded(text)):
        if token in _SENTENCE_ENDS:
            starts.add(len(words))
        elif token not in ARTICLES:
            words.append(token)
    return tuple(words), starts


def strict_phrase(text: str) -> str | None:
    """Returns the text after `#### ` in the last line; None if the line has no such text."""
    line = text.rstrip().rpartition("\n")[2]
    phrase = line[len(MARKER) + 1 :].strip()
    return phrase if line.startswith(MARKER + " ") and words_of(phrase) else None


def mentions(text: str, candidates: Candidates) -> list[str]:
    """Returns the answers that the candidate phrases in `text` stand for, in order of occurrence.

    Phrases match whole words, whatever their case and articles. Matches do not overlap, and of
    those that start at the same word, the longest counts: "does not know" does not count as "know",
    nor "metal box" as "box". A negation need not touch the phrase: "does not really know" stands
    for the answer of the candidate "not know". If there is no such candidate, the negated phrase is
    ignored, as in "not in the box". Two negations cancel each other.
    """
    words, starts = _words_and_starts(text)
    spelled = _spelled(candidates)
    found = (_meaning(words, starts, place, spelled) for place in _places(words, spelled))
    return [answer for answer in found if answer is not None]


def last_mention(text: str, candidates: Candidates) -> str | None:
    """Returns the last answer that `mentions` would return, or None, without finding the others."""
    words, starts = _words_and_starts(text)
    spelled = _spelled(candidates)
    places = reversed(collections.deque(_places(words, spelled), maxlen=_LAST))
    found = (_meaning(words, starts, place, spelled) for place in places)
    return next((answer for answer in found if answer is not None), None)


def _spelled(candidates: Candidates) -> _Spelled:
    spelled = {_candidate_words(phrase): answer for phrase, answer in candidates.items()}
    return {words: answer for words, answer in spelled.items() if 0 < len(words) <= _LONGEST}


def _places(words: tuple[str, ...], spelled: _Spelled) -> Iterator[slice]:
    """Yields the slices of `words` that match a candidate, in order and without overlaps.

    At each start, the longest match counts. The keys of `spelled` are the words of the candidates.
    """
    lengths: dict[str, list[int]] = {}
    for length in sorted({len(phrase) for phrase in spelled}, reverse=True):
        for first in {phrase[0] for phrase in spelled if len(phrase) == length}:
            lengths.setdefault(first, []).append(length)
    free = 0
    for index, word in enumerate(words):
        if index < free or word not in lengths:
            continue
        for length in lengths[word]:
            if words[index : index + length] in spelled:
                free = index + length
                yield slice(index, free)
                break


def _meaning(
    words: tuple[str, ...], starts: set[int], place: slice, spelled: _Spelled
) -> str | None:
    """Returns the answer of the candidate at `place` or, if it is negated, of its opposite.

    The opposite is the candidate with "not" added in front or, if the phrase starts with "not",
    without this word. The result is None if there is no opposite or no answer.
    """
    phrase = words[place]
    answer = spelled[phrase]
    if answer is None or not _denied(words, starts, place.start):
        return answer
    return spelled.get(phrase[1:] if phrase[0] == "not" else ("not", *phrase))


def _denied(words: Sequence[str], starts: set[int], index: int) -> bool:
    """Returns whether an odd number of negations precedes the word at `index` in its sentence.

    Only the `_REACH` (12) words before it count. Between a negation and this word, only the words
    in `_BETWEEN` ("not really in") and the subjects of thoughts ("does not think that Bob knows")
    may stand.
    """
    negations, place = 0, index
    while place > max(index - _REACH, 0) and place not in starts:
        place -= 1
        word, before = words[place], words[place - 1] if place else ""
        if word == "doubt" and before == "no":
            place -= 1
        elif word in _NEGATIONS or word.endswith("n't"):
            negations += 1
        elif (before, word) in _NEGATING_PAIRS:
            negations += 1
            place -= 1
        elif word not in _BETWEEN and before not in _BEFORE_SUBJECTS:
            break
    return negations % 2 == 1


def lenient_phrase(text: str, candidates: Candidates) -> str | None:
    """Returns the answer that `text` gives anywhere, or None if it contains no candidate.

    The answer is the first that is found in this order:

    1. the answer that the rest of the line after the last `####` states (see `stated`);
    2. the last candidate after this `####`;
    3. the answer after the last "answer is" or "answer:" that one follows ("**Answer:** the box");
    4. the last candidate before the `####`, or in the whole text if there is no `####`.

    In cases 2 and 4, a yes or no that starts the last line is the answer instead ("No, she left
    when they said yes.").
    """
    before, marker, after = text.rpartition(MARKER)
    if marker:
        if found := stated(after.partition("\n")[0], candidates):
            return found
        if found := last_mention(after, candidates):
            return _opening(after, candidates) or found
    for announced in reversed(collections.deque(_ANNOUNCED.finditer(text), maxlen=_LAST)):
        clause = text[announced.end() : announced.end() + _SPAN]
        if found := stated(clause.lstrip(" \n*_:").partition("\n")[0], candidates):
            return found
    found = last_mention(before if marker else text, candidates)
    return found and (_opening(text, candidates) or found)


def stated(line: str, candidates: Candidates) -> str | None:
    """Returns the answer that `line` gives, which is its first candidate, or None without one.

    Later words are read as an explanation ("The box, because she did not see it moved to the
    jar."), and so is a clause before the main clause ("Though it is in the jar, the box."). Only
    the first `_SPAN` (400) characters are read.
    """
    line = line[:_SPAN]
    main = line.partition(",")[2] if _SUBORDINATE.match(line) else ""
    for part in (main, line):
        if found := mentions(part, candidates):
            return found[0]
    return None


def answer_mark(completion: str) -> tuple[int, int] | None:
    """Returns the offsets (start, end) of the mark that introduces the answer, or None.

    The mark is the last `####` outside think blocks with a word after it on the same line.
    """
    end = len(completion)
    for line in reversed((visible_text(completion) or "").split("\n")):
        start = end - len(line)
        marker = line.rfind(MARKER, 0, max(_last_word(line), 0)) if MARKER in line else -1
        if marker >= 0:
            return start + marker, start + marker + len(MARKER)
        end = start - 1
    return None


def _last_word(line: str) -> int:
    """Returns the offset of the last word in `line` that is not an article, or −1."""
    words = (word.start() for word in _WORD.finditer(line) if word[0].casefold() not in ARTICLES)
    return max(words, default=-1)


def _opening(text: str, candidates: Candidates) -> str | None:
    """Returns "yes" or "no" if the last line of `text` starts with this answer, else None."""
    line = words_of(text.rstrip().rpartition("\n")[2][:_SPAN])
    if line[:1] not in (("yes",), ("no",)):
        return None
    found = mentions(" ".join(line[:2]), candidates)  # "no one" is not "no"
    return line[0] if found[:1] == [line[0]] else None


def final_phrase(text: str, candidates: Candidates) -> str | None:
    """Returns the answer that a last line `#### ...` states, or None if it states none.

    Without such a line, returns the result of `lenient_phrase`.
    """
    strict = strict_phrase(text)
    return lenient_phrase(text, candidates) if strict is None else stated(strict, candidates)


def judge(completion: str, answer: str, candidates: Candidates) -> VerdictKind:
    """Compares a completion's answer with the correct answer `answer`.

    Returns `strict` if the last line is `#### ` and only the correct answer, `lenient` if
    `final_phrase` finds the correct answer, `wrong` for another answer, and `none` for no answer.
    Case, articles, punctuation and think blocks are ignored.
    """
    text = visible_text(completion) or ""
    strict = strict_phrase(text)
    if strict is not None and words_of(strict) == words_of(answer):
        return "strict"
    found = final_phrase(text, candidates)
    if found is None:
        return "none" if strict is None else "wrong"
    return "lenient" if words_of(found) == words_of(answer) else "wrong"


def themselves(phrases: Sequence[str]) -> dict[str, str | None]:
    return {phrase: phrase for phrase in phrases}
