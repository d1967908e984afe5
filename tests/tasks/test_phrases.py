from jexit.tasks import phrases

PLACES = {
    **phrases.themselves(("box", "metal box", "the attic", "bookstore's back room")),
    "not said": "unknown",
}


def test_words_forget_case_articles_and_punctuation():
    assert phrases.words_of("The BOX, a bag-in-box & an 'Egg'.") == ("box", "bag-in-box", "egg")
    assert phrases.words_of("Bookstore\u2019s back_room") == ("bookstore's", "back", "room")
    assert phrases.words_of("the !? a") == ()


def test_strict_phrase():
    for text, phrase in (("so\n#### the box", "the box"), ("#### box \n\n", "box")):
        assert phrases.strict_phrase(text) == phrase
    for text in ("####box", "#### ", "#### .", "#### box\nand more", "it is #### box", ""):
        assert phrases.strict_phrase(text) is None


def test_mentions_and_what_is_denied():
    for text, *found in (
        ("From the box to the metal box, then the Attic.", "box", "metal box", "the attic"),
        ("boxes, a mailbox, metal boxes",),
        ("metal, box", "metal box"),  # punctuation does not divide
        ("It is not said: attic", "unknown", "the attic"),
        ("The bookstore\u2019s back room", "bookstore's back room"),
        ("not the box",),
        ("It isn\u2019t really in the box",),
        ("She does not think that Bob thinks it is in the box",),
        ("She does not think that Bob put the box",),
        ("neither in the box nor in the attic",),
        ("not in the box but in the attic", "the attic"),
        ("no longer in the box",),
        ("not only in the box", "box"),
        ("It is not not in the box", "box"),
        ("Not so. In the box", "box"),
        ("not: box", "box"),
        ("not a. box", "box"),  # the article between is no word, its full stop divides
        ("not not said",),
        ("not " * 7 + "box",),
        ("is " * 60_000 + "box", "box"),
    ):
        assert phrases.mentions(text, PLACES) == found, text[:60]
    known = {"hot": "hot", "not hot": "cold", "not cold": None, "cold": "cold"}
    assert phrases.mentions("hot, not hot, not really hot", known) == ["hot", "cold", "cold"]
    assert phrases.mentions("never not hot", known) == ["hot"]
    assert phrases.mentions("not really cold", known) == []
    name = "box " * 10_000  # of so many words none is looked for
    assert phrases.mentions(name, phrases.themselves([name])) == []
    assert phrases.judge(f"#### {name}", name, phrases.themselves([name])) == "strict"


def test_yes_and_no():
    for answer, *texts in (
        ("yes", "Yes.", "First no, then yes", "No one told her, yes?", "#### yes\nno more text"),
        ("no", "No, she said yes to him", "no\n####", "no\n####\nlonger"),
        ("no", "They said yes.\nNo: she had left when they said yes"),
        (None, "nobody knows, not now, eyes", "she is no longer there"),
    ):
        for text in texts:
            assert phrases.lenient_phrase(text, phrases.YES_NO) == answer, text


def test_a_line_is_answered_by_what_it_says_first():
    for text, answer in (
        ("#### box, because she did not see it moved to the metal box", "box"),
        ("#### metal box (it was moved there from the box)", "metal box"),
        ("#### Though it is in the box, she will look in the metal box.", "metal box"),
        ("#### Because the box is empty, she cannot tell", "box"),
        ("#### not in the metal box but in the box", "box"),
        ("in the box\n####\nI think the metal box", "metal box"),
        ("**Answer:** box\n\nExplanation: Liam moved it to the metal box.", "box"),
        ("The answer is the box. The thing is really in the metal box.", "box"),
        ("Answer:\nbox\nnot the metal box; it is in the metal box", "box"),
        ("My answer is about Liam.\nHe looks in the box, then the metal box", "metal box"),
    ):
        assert phrases.lenient_phrase(text, PLACES) == answer
        assert phrases.judge(text, answer, PLACES) == "lenient"
        assert phrases.judge(text, "the attic", PLACES) == "wrong"
    assert phrases.lenient_phrase("#### Before she left, nothing", PLACES) is None


def test_the_format_decides_first_and_thoughts_are_no_answers():
    for kind, *texts in (
        ("strict", "in the box\n#### A metal box.", "<think>box</think>\n#### metal box"),
        ("lenient", "#### It is in the metal box", "the metal box"),
        ("lenient", "It is in the box.</think>\nIt is in the metal box."),
        ("wrong", "the metal box\n#### box", "the metal box\n#### elsewhere"),
        ("wrong", "in the metal box, I mean the box", "<think>metal box</think>\n#### box"),
        ("none", "no idea", "<think>\nThe answer is\n#### metal box"),
        ("none", "<think>\nIt is in the metal box.", "<think>metal box</think>\n\nI cannot say."),
    ):
        for text in texts:
            assert phrases.judge(text, "metal box", PLACES) == kind, text


def test_the_mark_is_the_last_that_something_follows():
    for text, marked in (
        ("#### box ####", 0),
        ("#### box #### jar ####", 9),
        ("#### box\n#### the\n####", 0),
        ("box #####jar", 5),
        ("box ####", None),
        ("#### ####\nbox", None),
        ("<think>#### box</think>\n#### jar", 24),
    ):
        assert phrases.answer_mark(text) == (None if marked is None else (marked, marked + 4))
