from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jexit.tasks import answers

# Text that looks like answers, to reach the parser's corners more often than plain text does.
PIECES = ["####", " ", "\n", "$", "-", "\u2212", ",", ".", "/", "1", "0", "18", "999", "²", "٣"]
PIECES += ["\\boxed{", "}", "{", "\\frac{1}{2}", "dollars", "\x00", "\ud800"]
answer_like = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.", 18),
        ("18.00", 18),
        ("$18.00", 18),
        ("$ 18", 18),
        ("1,000", 1000),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("-3", -3),
        ("\u22123", -3),
        ("-$3", -3),
        ("$-3", -3),
        ("1/2", Fraction(1, 2)),
        ("1 / 2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("18 dollars", 18),
        ("**18**", 18),
        ("18%", 18),
        ("\\boxed{18}", 18),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("\\dfrac{3}{4}", Fraction(3, 4)),
        ("- 3 apples", 3),
        ("12, 13", 12),
        ("007", 7),
        ("", None),
        ("none", None),
        ("1/0", None),
        ("9" * 5000, None),
    ],
)
def test_parse_number(text, value):
    assert answers.parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2 = 24 and 48+24 = 72 clips.", 72),
        ("3 then -4", -4),
        ("10-3", 3),
        ("(2+5)-3", 3),
        ("it fell by -5", -5),
        ("= -5", -5),
        ("costs $1,250.", 1250),
        ("nothing", None),
    ],
)
def test_last_number(text, value):
    assert answers.last_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3+4=7\n#### 7", 7),
        ("#### 7", 7),
        ("#### 7\n", 7),
        ("#### $1,000.00", 1000),
        ("#### -3", -3),
        ("#### 18.", 18),
        ("####7", None),
        ("#### 7 apples", None),
        ("#### 7\nSo seven.", None),
        ("so #### 7", None),
        ("#### ", None),
        ("##### 7", None),
        ("", None),
    ],
)
def test_strict_number(text, value):
    assert answers.strict_number(text) == value


@pytest.mark.parametrize(
    ("completion", "answer", "kind"),
    [
        ("#### 1000", "1,000", "strict"),
        ("#### 1,000.0", "1000", "strict"),
        ("first 5, then\n#### 6", "5", "wrong"),
        ("\\boxed{18} as 3 + 15 = 18, see step 2", "18", "lenient"),
        ("\\boxed{17} no, \\boxed{18}", "18", "lenient"),
        ("#### 18 dollars", "18", "lenient"),
        ("The answer is $18.00.", "18", "lenient"),
        ("I count 3, then 4", "3", "wrong"),
        ("I do not know", "18", "none"),
        ("", "18", "none"),
        ("#### 0.5", "1/2", "strict"),
    ],
)
def test_judge(completion, answer, kind):
    assert answers.judge(completion, answer) == kind


@given(text=st.text() | answer_like)
@example("\\boxed{" * 2000)
@example("#" * 5000)
@example("1," * 3000)
def test_every_function_is_total(text):
    for function in (answers.parse_number, answers.last_number):
        assert isinstance(function(text), Fraction | None)
    for function in (answers.strict_number, answers.lenient_number):
        assert isinstance(function(text), Fraction | None)
    assert answers.judge(text, "18") in ("strict", "lenient", "wrong", "none")


@given(number=st.integers(-(10**9), 10**9), places=st.integers(0, 3))
def test_formatted_numbers_are_read_back(number, places):
    value = Fraction(number, 10**places)
    for text in (f"{float(value):.{places}f}", f"{float(value):,.{places}f}"):
        assert answers.parse_number(text) == value
        assert answers.strict_number(f"work\n#### {text}") == value
        assert answers.judge(f"#### {text}", f"{value.numerator}/{value.denominator}") == "strict"
