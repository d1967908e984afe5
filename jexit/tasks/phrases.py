"""Finding and comparing answers that are words: places, yes and no.

Every function is total, and its time is linear in the text.
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
# "no" here is no answer.
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
_LAST = 64  # announcements and mentions that are looked at, from the end: before them is no answer
_LONGEST = 32  # words of a candidate that is looked for in a text
_SUBORDINATE = re.compile(
    r"\W*(?:(?:even )?though|although|while|since|because|as|after|before|when|if)\b", re.IGNORECASE
)
_REACH = 12  # words before a phrase in which its negation may stand


def words_of(text: str) -> tuple[str, ...]:
    """The words in lower case, without articles, punctuation and typographic apostrophes.

    >>> words_of("In the bookstore’s **Back Room**.")
    ('in', "bookstore's", 'back', 'room')
    """
    return tuple(word for word in _WORD.findall(_folded(text)) if word not in ARTICLES)


# A task asks for the same few phrases in every text.
_candidate_words = functools.lru_cache(maxsize=4096)(words_of)


def _folded(text: str) -> str:
    return text.replace("\u2019", "'").casefold()


def _words_and_starts(text: str) -> tuple[tuple[str, ...], set[int]]:
    """`words_of(text)`, and the places in it before which a sentence or clause ends."""
    words: list[str] = []
    starts: set[int] = set()
    for token in _TOKEN.findall(_folded(text)):
        if token in _SENTENCE_ENDS:
            starts.add(len(words))
        elif token not in ARTICLES:
            words.append(token)
    return tuple(words), starts


def strict_phrase(text: str) -> str | None:
    """What stands on a final line `#### ...`; None when the text does not end in such a line."""
    line = text.rstrip().rpartition("\n")[2]
    phrase = line[len(MARKER) + 1 :].strip()
    return phrase if line.startswith(MARKER + " ") and _says_something(phrase) else None


def _says_something(text: str) -> bool:
    return any(word.group() not in ARTICLES for word in _WORD.finditer(_folded(text)))


def mentions(text: str, candidates: Candidates) -> list[str]:
    """What the candidate phrases in a text stand for, in order.

    `candidates` maps phrases to the answer that each stands for, None for phrases to pass over.
    Phrases match whole words, whatever the case and the articles, and the longest wins, so that
    "does not know" holds no "know" and "metal box" no "box". One that is denied from further off
    ("does not really know") stands for what the candidate "not know" does, if there is one, and for
    nothing otherwise ("not in the box"); denied twice it stands.
    """
    words, starts = _words_and_starts(text)
    spelled = _spelled(candidates)
    found = (_meaning(words, starts, place, spelled) for place in _places(words, spelled))
    return [answer for answer in found if answer is not None]


def last_mention(text: str, candidates: Candidates) -> str | None:
    """The last of `mentions`, None without any."""
    words, starts = _words_and_starts(text)
    spelled = _spelled(candidates)
    places = reversed(collections.deque(_places(words, spelled), maxlen=_LAST))
    found = (_meaning(words, starts, place, spelled) for place in places)
    return next((answer for answer in found if answer is not None), None)


def _spelled(candidates: Candidates) -> _Spelled:
    spelled = {_candidate_words(phrase): answer for phrase, answer in candidates.items()}
    return {words: answer for words, answer in spelled.items() if 0 < len(words) <= _LONGEST}


def _places(words: tuple[str, ...], spelled: _Spelled) -> Iterator[slice]:
    """Where candidates stand, the longest of those that start at a word."""
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
    """What the candidate at a place stands for, denied or not."""
    phrase = words[place]
    answer = spelled[phrase]
    if answer is None or not _denied(words, starts, place.start):
        return answer
    return spelled.get(phrase[1:] if phrase[0] == "not" else ("not", *phrase))


def _denied(words: Sequence[str], starts: set[int], index: int) -> bool:
    """Whether an odd number of negations stands before the phrase at `index`, in its sentence.

    Between them and the phrase are only words that carry a negation on, and the subjects of what is
    thought ("does not think that Bob knows").
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
    """The answer wherever it stands.

    What the line of the last `####` states, else the last candidate after it, else what the text
    announces last ("**Answer:** the box"), else the last candidate before it. A last line that
    opens with yes or no is answered by that word ("No, she left when they said yes.").
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
    """The answer that a line gives: its first candidate, for what comes after explains.

    "The box, because she did not see it moved to the jar." What comes before the main clause does
    so too: "Though it is in the jar, the box." Of a long line the first `_SPAN` characters count.
    """
    line = line[:_SPAN]
    main = line.partition(",")[2] if _SUBORDINATE.match(line) else ""
    for part in (main, line):
        if found := mentions(part, candidates):
            return found[0]
    return None


def answer_mark(completion: str) -> tuple[int, int] | None:
    """Start and end of the last `####` on whose line something is said; None: there is none.

    None also while a think block is open, whose thoughts are no answer.
    """
    text = visible_text(completion)
    if text is None:
        return None
    hidden, end = len(completion) - len(text), len(text)
    while (marker := text.rfind(MARKER, 0, end)) >= 0:
        start = text.rfind("\n", 0, marker) + 1
        said = start + _last_word(text[start : _line_end(text, marker)])
        marker = text.rfind(MARKER, start, max(said, start))
        if marker >= 0:
            return hidden + marker, hidden + marker + len(MARKER)
        end = start
    return None


def _last_word(line: str) -> int:
    """Where the last word of a line starts that is no article; −1: there is none."""
    words = (word.start() for word in _WORD.finditer(line) if word[0].casefold() not in ARTICLES)
    return max(words, default=-1)


def _opening(text: str, candidates: Candidates) -> str | None:
    """The yes or no that the text's last line opens with."""
    line = words_of(text.rstrip().rpartition("\n")[2][:_SPAN])
    if line[:1] not in (("yes",), ("no",)):
        return None
    found = mentions(" ".join(line[:2]), candidates)  # "no one" is no "no"
    return line[0] if found[:1] == [line[0]] else None


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def final_phrase(text: str, candidates: Candidates) -> str | None:
    """The answer of a text: what a final line `#### ...` states, else `lenient_phrase`."""
    strict = strict_phrase(text)
    return lenient_phrase(text, candidates) if strict is None else stated(strict, candidates)


def judge(completion: str, answer: str, candidates: Candidates) -> VerdictKind:
    """How a completion compares with the right answer.

    A final line `#### ...` is the answer, whatever else the text says: `strict` if it is the answer
    alone, `lenient` if it is the answer in a sentence. `candidates` are the phrases that count as
    answers elsewhere. Thoughts do not count, and an unfinished one leaves no answer
    (`jexit.tasks.answers.visible_text`).
    """
    text = visible_text(completion)
    if text is None:
        return "none"
    strict = strict_phrase(text)
    if strict is not None and words_of(strict) == words_of(answer):
        return "strict"
    found = final_phrase(text, candidates)
    if found is None:
        return "none" if strict is None else "wrong"
    return "lenient" if words_of(found) == words_of(answer) else "wrong"


def themselves(phrases: Sequence[str]) -> dict[str, str | None]:
    """Candidates that each stand for themselves."""
    return {phrase: phrase for phrase in phrases}
