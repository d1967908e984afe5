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


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("so\n#### the box", "the box"),
        ("#### box \n\n", "box"),
        ("####box", None),
        ("#### ", None),
        ("#### .", None),
        ("#### box\nand more", None),
        ("it is #### box", None),
        ("", None),
    ],
)
def test_strict_phrase(text, phrase):
    assert phrases.strict_phrase(text) == phrase


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("From the box to the metal box, then the Attic.", ["box", "metal box", "the attic"]),
        ("boxes, a mailbox, metal boxes", []),
        ("metal, box", ["metal box"]),  # punctuation does not divide
        ("It is not said: attic", ["unknown", "the attic"]),
        ("The bookstore\u2019s back room", ["bookstore's back room"]),
        ("", []),
    ],
)
def test_mentions(text, found):
    assert phrases.mentions(text, PLACES) == found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes.", "yes"),
        ("First no, then yes", "yes"),
        ("No, she said yes to him", "no"),
        ("They said yes.\nNo: she had left when they said yes", "no"),
        ("No one told her, yes?", "yes"),
        ("nobody knows, not now, eyes", None),
        ("she is no longer there", None),
        ("#### yes\nno more text", "yes"),
        ("no\n####", "no"),
    ],
)
def test_yes_and_no(text, answer):
    assert phrases.lenient_phrase(text, phrases.YES_NO) == answer


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


@given(text=st.text(), answer=st.text(), others=st.lists(st.text()))
def test_every_function_is_total(text, answer, others):
    candidates = phrases.themselves([answer, *others])
    assert phrases.judge(text, answer, candidates) in ("strict", "lenient", "wrong", "none")
    assert set(phrases.mentions(text, candidates)) <= set(candidates)
