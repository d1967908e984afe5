import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import phrases

PLACES = {
    **phrases.themselves(("box", "metal box", "the attic", "bookstore's back room")),
    "not said": "unknown",
}


def test_words_forget_case_articles_and_punctuation():
    assert phrases.words_of("The BOX, a bag-in-box & an 'Egg'.") == (*("box", "bag-in-box", "egg"),)
    assert phrases.words_of("Bookstore\u2019s back_room") == ("bookstore's", "back", "room")
    assert phrases.words_of("the !? a") == ()


STRICT_PHRASE = [
    ("so\n#### the box", "the box"),
    ("#### box \n\n", "box"),
    ("####box", None),
    ("#### ", None),
    ("#### .", None),
    ("#### box\nand more", None),
    ("it is #### box", None),
    ("", None),
]


def test_strict_phrase():
    for text, phrase in STRICT_PHRASE:
        assert phrases.strict_phrase(text) == phrase


MENTIONS = [
    ("From the box to the metal box, then the Attic.", ["box", "metal box", "the attic"]),
    ("boxes, a mailbox, metal boxes", []),
    ("metal, box", ["metal box"]),  # punctuation does not divide
    ("It is not said: attic", ["unknown", "the attic"]),
    ("The bookstore\u2019s back room", ["bookstore's back room"]),
    ("", []),
]


def test_mentions():
    for text, found in MENTIONS:
        assert phrases.mentions(text, PLACES) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("not the box", []),
        ("It isn\u2019t really in the box", []),
        ("She does not think that Bob thinks it is in the box", []),
        ("She does not think that Bob put the box", []),
        ("neither in the box nor in the attic", []),
        ("not in the box but in the attic", ["the attic"]),
        ("no longer in the box", []),
        ("not only in the box", ["box"]),
        ("It is not not in the box", ["box"]),
        ("Not so. In the box", ["box"]),
        ("not: box", ["box"]),
        ("not a. box", ["box"]),  # the article between is no word, its full stop divides
        ("not not said", []),
        ("not " * 7 + "box", []),
        ("is " * 60_000 + "box", ["box"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_denied_is_not_mentioned(text, found):
    assert phrases.mentions(text, PLACES) == found


def test_a_denied_phrase_stands_for_what_its_candidate_says():
    known = {"hot": "hot", "not hot": "cold", "not cold": None, "cold": "cold"}
    assert phrases.mentions("hot, not hot, not really hot", known) == ["hot", "cold", "cold"]
    assert phrases.mentions("never not hot", known) == ["hot"]
    assert phrases.mentions("not really cold", known) == []


YES_AND_NO = [
    ("Yes.", "yes"),
    ("First no, then yes", "yes"),
    ("No, she said yes to him", "no"),
    ("They said yes.\nNo: she had left when they said yes", "no"),
    ("No one told her, yes?", "yes"),
    ("nobody knows, not now, eyes", None),
    ("she is no longer there", None),
    ("#### yes\nno more text", "yes"),
    ("no\n####", "no"),
]


def test_yes_and_no():
    for text, answer in YES_AND_NO:
        assert phrases.lenient_phrase(text, phrases.YES_NO) == answer


SAID_FIRST = [
    ("#### box, because she did not see it moved to the metal box", "box"),
    ("#### metal box (it was moved there from the box)", "metal box"),
    ("#### Though it is in the box, she will look in the metal box.", "metal box"),
    ("#### Before she left, nothing", None),
    ("#### Because the box is empty, she cannot tell", "box"),
    ("#### not in the metal box but in the box", "box"),
    ("in the box\n####\nI think the metal box", "metal box"),
    ("**Answer:** box\n\nExplanation: Liam moved it to the metal box.", "box"),
    ("The answer is the box. The thing is really in the metal box.", "box"),
    ("Answer:\nbox\nnot the metal box; it is in the metal box", "box"),
    ("My answer is about Liam.\nHe looks in the box, then the metal box", "metal box"),
    ("first the box, then the metal box", "metal box"),
]


def test_a_line_is_answered_by_what_it_says_first():
    for text, answer in SAID_FIRST:
        assert phrases.lenient_phrase(text, PLACES) == answer
        last_line = text.startswith("####")
        truth, other = answer or "box", "metal box" if answer == "box" else "box"
        assert phrases.judge(text, other, PLACES) in ("wrong", "none")
        expected = (
            "none" if answer is None and not last_line else "wrong" if answer is None else "lenient"
        )
        assert phrases.judge(text, truth, PLACES) == expected


def test_the_format_decides_first():
    def kind(text):
        return phrases.judge(text, "metal box", PLACES)

    assert kind("in the box\n#### A metal box.") == "strict"
    assert kind("#### It is in the metal box") == "lenient"
    assert kind("the metal box\n#### box") == "wrong"
    assert kind("the metal box\n#### elsewhere") == "wrong"
    assert kind("the metal box") == "lenient"
    assert kind("in the metal box, I mean the box") == "wrong"
    assert kind("no idea") == "none"


def test_a_phrase_does_not_go_on_beyond_the_marker():
    assert phrases.lenient_phrase("no\n####\nlonger", phrases.YES_NO) == "no"


def test_of_many_words_none_is_looked_for():
    name = "box " * 10_000
    assert phrases.mentions(name, phrases.themselves([name])) == []
    assert phrases.judge(f"#### {name}", name, phrases.themselves([name])) == "strict"


LAST_MARKS = [
    ("#### box ####", 0),
    ("#### box #### jar ####", 9),
    ("#### box\n#### the\n####", 0),
    ("box #####jar", 5),
    ("box ####", None),
    ("#### ####\nbox", None),
    ("<think>#### box</think>\n#### jar", 24),
    ("####" * 3, None),
]


def test_the_mark_is_the_last_that_something_follows():
    for text, marked in LAST_MARKS:
        assert phrases.answer_mark(text) == (None if marked is None else (marked, marked + 4))


@given(text=st.text(), answer=st.text(), others=st.lists(st.text()))
def test_every_function_is_total(text, answer, others):
    candidates = phrases.themselves([answer, *others])
    assert phrases.judge(text, answer, candidates) in ("strict", "lenient", "wrong", "none")
    assert set(phrases.mentions(text, candidates)) <= set(candidates)
