import random
import time
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jexit.tasks import Blend, Sums, Tom, WordProblems, answers

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
        ("#### 20 - 2 = 18", "18", "lenient"),
        ("#### x = 18", "18", "lenient"),
        ("20 - 2 = 18\n#### 20 - 2", "18", "wrong"),
        ("\\boxed{1{,}000}", "1000", "lenient"),
        ("\\boxed{1,\\!080}", "1080", "lenient"),
        ("\\boxed{1\\,080}", "1080", "lenient"),
        ("\\boxed{9 \\times 2 = 18}", "18", "lenient"),
        ("\\boxed{2\\frac{1}{2}}", "2.5", "lenient"),
        ("\\boxed{\\frac{3}{4}}", "0.75", "lenient"),
        ("#### 18 (= 9 * 2)", "18", "lenient"),
        ("#### (9 * 2 = 18)", "18", "lenient"),
        ("**Answer: 18**\n\nSo she makes 18 dollars from 9 eggs.", "18", "lenient"),
        ("The final answer is 18. (Note that 3+4=7 eggs are used.)", "18", "lenient"),
        ("The answer is 9 * 2 = 18", "18", "lenient"),
        (
            "#### Step 1: eggs\n16-7=9\n#### Step 2: money\nShe makes 18 dollars.",
            "18",
            "lenient",
        ),
        ("#### Step 1: eggs\n16-7=9\n#### 18", "18", "strict"),
        # Markdown's headings.
        ("#### Calculation:\n3*4 = 12 and 12 + 6 = 18\n\nThe answer is 18.", "18", "lenient"),
        ("#### 2. Find the revenue\n9 * 2 = 18\n\nThe answer is 18.", "18", "lenient"),
        ("#### Solution\nShe has 16 eggs. 9*2 = 18.\n\nSo she makes $18.", "18", "lenient"),
        ("#### 18\n\n#### Explanation\nShe sold 9 eggs for 2 dollars.", "18", "lenient"),
        ("#### The 3 friends pay 18 dollars", "18", "lenient"),
        ("#### Answer:\n18", "18", "lenient"),
        ("#### **Final Answer**\n\n$18", "18", "lenient"),
        ("#### Final answer: 18 dollars for 9 eggs", "18", "lenient"),
        ("####\n18", "18", "lenient"),
        ("####\n\nShe has 16 eggs.", "16", "lenient"),
        # Equal sides, of which one is a number.
        ("The answer is $3 \\times 4 = 12$.", "12", "lenient"),
        ("The answer is 12 ÷ 3 = 4.", "4", "lenient"),
        ("The answer is 12 x 3 = 36.", "36", "lenient"),
        ("The answer is 20% of 50 = 10.", "10", "lenient"),
        ("The answer is 2 hours and 30 minutes = 150 minutes", "150", "lenient"),
        ("The answer is 18, since 16 - 7 = 9 eggs are left", "18", "lenient"),
        ("The answer is 18 because 9 * 2 = 18 and 3 + 4 = 7", "18", "lenient"),
        ("The answer is 1,080. She has 5.", "1080", "lenient"),
        ("answer = 18\nThat is for 9 eggs", "18", "lenient"),
        ("9 * 2 makes 18; the answer is 9 * 2", "2", "lenient"),  # announces none: the last one
        ("\\boxed{18 = 6 \\cdot 3}", "18", "lenient"),
        ("#### 18 = 6*3", "18", "lenient"),
        ("#### 3 1/2", "3.5", "lenient"),
        ("#### Cost of 3 apples\n3*2=6\nThe total cost is 6.", "6", "lenient"),
        ("#### Cost of 3 apples\nThat is six.", "3", "lenient"),
        ("#### 18. She makes 2 dollars an egg.", "18", "lenient"),
        ("#### 2. Find the price\n9 * 2 = 18", "18", "lenient"),
        ("#### Total: 18 dollars\nShe sells 9 eggs.", "18", "lenient"),
        ("#### Janet makes 18 dollars\nI hope that this helps!", "18", "lenient"),
        ("\\boxed{\\frac12}", "1/2", "lenient"),
        ("\\boxed{3\\frac12}", "3.5", "lenient"),
        ("She works 1 1/2 hours", "1.5", "lenient"),
    ],
)
def test_judge(completion, answer, kind):
    assert answers.judge(completion, answer) == kind


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("16 - 7 = 9, and 9 *", False),
        ("#### Step 1: 16 - 7 = 9", False),
        ("#### Eggs per day\nShe has 16 eggs and eats 3", False),
        ("16 - 7 = 9\n#### 9", True),
        ("so \\boxed{9}, as we", True),
        ("<think>\\boxed{9}</think> There are 16 eggs and", False),
        ("<think>16 - 7</think>\n#### 9", True),
        ("", False),
    ],
)
def test_what_was_cut_off_has_an_answer_only_where_it_says_so(text, kept):
    assert WordProblems().answerable(text, cut=True) == (text if kept else "")
    assert WordProblems().answerable(text, cut=False) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Tom sees the box: box\n#### box\nSo the coins are in", True),
        ("#### yes\n", True),
        ("Tom sees the box: box\n####", False),
        ("#### \nTom sees the box", False),
        ("<think>Tom\n#### box</think> Tom sees", False),
        ("<think>Tom\n#### box", False),
        ("<think>Tom</think>\n#### box, because he", True),
        ("Tom sees the box", False),
    ],
)
def test_words_that_were_cut_off_are_an_answer_where_they_are_marked(text, kept):
    for task in (Tom(), Blend(tasks=[Sums(), Tom()])):
        assert task.answerable(text, cut=True) == (text if kept else "")
        assert task.answerable(text, cut=False) == text


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


@pytest.mark.parametrize(
    ("completion", "visible"),
    [
        ("#### 7", "#### 7"),
        ("<think>3+4</think>#### 7", "#### 7"),
        ("3+4\n</think>\n\n#### 7", "\n\n#### 7"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>3+4 is\n#### 7", None),
        ("<think>a</think>#### 7\n<think>or", None),
        ("<think>", None),
        ("</think>", ""),
        ("", ""),
    ],
)
def test_visible_text(completion, visible):
    assert answers.visible_text(completion) == visible


@pytest.mark.parametrize(
    ("completion", "chain"),
    [
        ("3+4=7\n#### 7", "3+4=7"),
        ("3+4=7", "3+4=7"),
        ("#### 7", ""),
        ("a #### 1\nb\n\n#### 2", "a #### 1\nb"),
        (
            "#### Sum\n3+4=7\n#### Total\nIt is \\boxed{7}.",
            "#### Sum\n3+4=7\n#### Total\nIt is \\boxed{7}.",
        ),
        ("<think>\n3+4=7\n</think>\n\nSo it is\n#### 7", "<think>\n3+4=7"),
        ("3+4=7 </think>#### 7", "3+4=7"),
        ("<think>\n3 #### 4 ", "<think>\n3 #### 4"),
        ("", ""),
    ],
)
def test_chain_of_thought(completion, chain):
    assert answers.chain_of_thought(completion) == chain


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        ("<think>\n6? no, 5+2\n</think>\n\n5+2=7\n#### 7", "strict"),
        ("5+2\n</think>\n\n#### 7", "strict"),
        ("<think>7</think>It is \\boxed{7}.", "lenient"),
        ("<think>\n#### 7\n</think>\n#### 8", "wrong"),
        ("<think>It is 7.</think>I cannot say.", "none"),
        ("<think>\n5+2=7\n#### 7", "none"),
        ("<think>5+2</think>7, but <think>wait", "none"),
    ],
)
def test_thoughts_are_no_answers(completion, kind):
    assert answers.judge(completion, "7") == kind


def _random_text(draw):
    pieces = [*PIECES, "<think>", "</think>", "9" * 70, "1,234", "(", "٣٤", "೧", "Ⅷ", "𝟛", "\u200b"]
    if draw.random() < 0.5:
        end = "\n#### 18" if draw.random() < 0.1 else ""
        return "".join(draw.choices(pieces, k=draw.randrange(24))) + end
    return "".join(chr(draw.randrange(1, 0x3000)) for _ in range(draw.randrange(24)))


# Under a second a 10,000.
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_random_texts_are_judged(seed):
    draw, kinds = random.Random(seed), dict.fromkeys(("strict", "lenient", "wrong", "none"), 0)
    for _ in range(10_000):
        text = _random_text(draw)
        kinds[answers.judge(text, "18")] += 1
        number = answers.final_number(text)
        assert number is None or isinstance(number, Fraction)
        assert text.startswith(answers.chain_of_thought(text))
    assert min(kinds.values()) > 0, "the texts reach every verdict"


@pytest.mark.parametrize(
    "text",
    [
        "{" * 50_000,
        "\\boxed{" * 10_000,
        "\\boxed{" + "{}" * 25_000,
        "\\boxed{" + "{" * 50_000,
        "\\boxed" + " " * 50_000,
        "\\boxed{a " * 10_000,
        "\\frac{" + " " * 50_000,
        "\\frac{1}" * 10_000,
        "1" * 50_000,
        "1," * 25_000,
        "111," * 12_500 + "1111",
        "1/" * 25_000,
        "1 / " * 12_500,
        "$-" * 25_000,
        "#" * 50_000,
        "#### " * 10_000,
        "\n" * 50_000,
        "<think>" * 8_000,
        "</think>" * 8_000,
        "#### step " * 8_000,
        "#### a\n" * 8_000,
        "####" + "\n" * 50_000,
        "answer " * 8_000,
        "the answer is 1 + " * 4_000,
        "=1+1" * 12_500,
        "1 1/2 " * 8_000,
        "#" * 50_000 + " step",
        "1" + " " * 50_000 + "x",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_no_text_takes_long(text):
    began = time.perf_counter()
    answers.judge(text, "18")
    answers.chain_of_thought(text)
    # Linear time is some 20 ms here; a search that goes back at every character takes minutes.
    assert time.perf_counter() - began < 5.0
