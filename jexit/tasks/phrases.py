"""Finding and comparing answers that are words: places, yes and no. Every function is total."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

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
_SENTENCE_END = re.compile(r"[.!?;:\n]")

Candidates = Mapping[str, str | None]

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
_SPAN = 200  # characters
_ANNOUNCEMENTS = 8  # the last ones of a text, of which one names a candidate if any does
_SUBORDINATE = re.compile(
    r"\W*(?:(?:even )?though|although|while|since|because|as|after|before|when|if)\b", re.IGNORECASE
)
_REACH = 12  # words before a phrase in which its negation may stand


def words_of(text: str) -> tuple[str, ...]:
    """The words in lower case, without articles, punctuation and typographic apostrophes.

    >>> words_of("In the bookstore’s **Back Room**.")
    ('in', "bookstore's", 'back', 'room')
    """
    found = _WORD.findall(_folded(text))
    return tuple(word for word in found if word not in ARTICLES)


# A task asks for the same few phrases in every text.
_candidate_words = functools.lru_cache(maxsize=4096)(words_of)


def _folded(text: str) -> str:
    return text.replace("\u2019", "'").casefold()


def _sentence_starts(text: str) -> set[int]:
    """Places in `words_of(text)` before which a sentence or clause ends."""
    folded, starts, place, end = _folded(text), set(), 0, 0
    for match in _WORD.finditer(folded):
        if _SENTENCE_END.search(folded, end, match.start()):
            starts.add(place)
        end = match.end()
        place += match.group() not in ARTICLES
    return starts


def strict_phrase(text: str) -> str | None:
    """What stands on a final line `#### ...`; None when the text does not end in such a line."""
    line = text.rstrip().rpartition("\n")[2]
    phrase = line[len(MARKER) + 1 :].strip()
    return phrase if line.startswith(MARKER + " ") and words_of(phrase) else None


def mentions(text: str, candidates: Candidates) -> list[str]:
    """What the candidate phrases in a text stand for, in order.

    `candidates` maps phrases to the answer that each stands for, None for phrases to pass over.
    Phrases match whole words, whatever the case and the articles, and the longest wins, so that
    "does not know" holds no "know" and "metal box" no "box". One that is denied from further off
    ("does not really know") stands for what the candidate "not know" does, if there is one, and for
    nothing otherwise ("not in the box"); denied twice it stands.
    """
    spelled = {_candidate_words(phrase): answer for phrase, answer in candidates.items()}
    spelled.pop((), None)
    longest = max(map(len, spelled), default=0)
    words, starts, found, index = words_of(text), _sentence_starts(text), [], 0
    while index < len(words):
        for length in range(min(longest, len(words) - index), 0, -1):
            phrase = words[index : index + length]
            if phrase in spelled:
                answer = spelled[phrase]
                if answer is not None and _denied(words, starts, index):
                    denied = phrase[1:] if phrase[0] == "not" else ("not", *phrase)
                    answer = spelled.get(denied)
                if answer is not None:
                    found.append(answer)
                index += length
                break
        else:
            index += 1
    return found


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
    announces last ("**Answer:** the box"), else its last candidate. A last line that opens with yes
    or no is answered by that word ("No, she left when they said yes.").
    """
    _, marker, tail = text.rpartition(MARKER)
    if marker and (found := stated(tail.partition("\n")[0], candidates)):
        return found
    if marker and (mentioned := mentions(tail, candidates)):
        return _opening(tail, candidates) or mentioned[-1]
    for announced in reversed(list(_ANNOUNCED.finditer(text))[-_ANNOUNCEMENTS:]):
        after = text[announced.end() : announced.end() + _SPAN]
        line = after.lstrip(" \n*_:").partition("\n")[0]
        if found := stated(line, candidates):
            return found
    mentioned = mentions(text, candidates)
    return (_opening(text, candidates) or mentioned[-1]) if mentioned else None


def stated(line: str, candidates: Candidates) -> str | None:
    """The answer that a line gives: its first candidate, for what comes after explains.

    "The box, because she did not see it moved to the jar." What comes before the main clause does
    so too: "Though it is in the jar, the box."
    """
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
    place = text.rfind(MARKER)
    while place >= 0 and not words_of(text[place + len(MARKER) : _line_end(text, place)]):
        place = text.rfind(MARKER, 0, place)
    if place < 0:
        return None
    place += len(completion) - len(text)
    return place, place + len(MARKER)


def _opening(text: str, candidates: Candidates) -> str | None:
    """The yes or no that the text's last line opens with."""
    line = words_of(text.rstrip().rpartition("\n")[2])
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
