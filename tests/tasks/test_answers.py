"""Numbers in free text: which one a completion answers, and that none is worked out."""

import json
import pathlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import answers
from jexit.tasks.blend import Blend
from jexit.tasks.sums import Sums
from jexit.tasks.tom.task import Tom
from jexit.tasks.word_problems import WordProblems

HALF = Fraction(1, 2)


def test_a_number_is_read_where_a_text_starts():
    for value, *texts in (
        (18, "18", "18.", "18.00", "$18.00", "$ 18", "18 dollars", "**18**", "18%", "\\boxed{18}"),
        (-3, "-3", "\u22123", "-$3", "$-3"),
        (HALF, "1/2", "1 / 2", ".5", "\\frac{1}{2}", "\\frac12"),
        (-HALF, "-1/2"),
        (Fraction(3, 4), "\\dfrac{3}{4}"),
        (1000, "1,000"),
        (Fraction(2469135, 2), "1,234,567.5"),
        (3, "- 3 apples"),
        (12, "12, 13"),
        (7, "007"),
        (None, "", "none", "1/0", "9" * 5000),
    ):
        for text in texts:
            assert answers.parse_number(text) == value, text


def test_the_last_number_of_a_text():
    for text, value in (
        ("48/2 = 24 and 48+24 = 72 clips.", 72),
        ("3 then -4", -4),
        ("7 of 10-3", 7),
        ("7, that is (2+5)-3", 7),
        ("it fell by -5", -5),
        ("it fell by 3 -5", -5),
        ("18 eggs, at 12:30", 18),
        ("18 (= 9 eggs * $2)", 18),
        ("18, not 1,00 or 3.5.2 or 1e3 or 2 x 4 or 2 \\times 4", 18),
        ("18 cm^2 and x^{12}", 18),
        ("from 12 to 18", 18),
        ("half of 36/2", None),
        ("7" + "+1" * 500, None),
        ("7. " + "a" * 1000, 7),
        ("7 " + "1+1 = " * 200, None),
        ("1" * 61, None),
        ("costs $1,250.", 1250),
    ):
        assert answers.last_number(text) == value, text


def test_the_strict_format_is_one_number_on_the_last_line():
    for value, *lines in (
        (7, "#### 7", "#### 7\n", "#### 7.", "3+4=7\n#### 7", "#### $7.00"),
        (1000, "#### $1,000.00"),
        (HALF, "#### 1/2", "#### .5"),
        (Fraction(5, 2), "#### 2 1/2"),
        (Fraction(-13, 4), "#### -3 1/4"),
        (None, "", "#### ", "####7", "##### 7", "so #### 7", "#### 7 apples", "#### 7\nSo seven."),
        (None, "#### 7..", "#### 36/2", "#### 6/4", "#### 7/1", "#### 7/0", "#### 1.5/2"),
        (None, "#### 2 3/2", "#### 5-7", "#### 7:00", "#### 1,00", "#### 7 or 8"),
    ):
        for line in lines:
            assert answers.strict_number(line) == value, line


VERDICTS = [
    ("#### 1000", "1,000", "strict"),
    ("#### 1,000.0", "1000", "strict"),
    ("#### 0.5", "1/2", "strict"),
    ("first 5, then\n#### 6", "5", "wrong"),
    ("I count 3, then 4", "3", "wrong"),
    ("", "18", "none"),
    ("\\boxed{17} no, \\boxed{18}", "18", "lenient"),
    ("\\boxed{\\pi \\cdot 2 \\approx 6.28}", "6.28", "lenient"),
    ("\\boxed{90^\\circ}", "90", "lenient"),
    ("\\boxed{18\\text{ cm}^2}", "18", "lenient"),
    ("\\boxed{1\\,080}", "1080", "lenient"),
    ("\\boxed{3\\frac12}", "3.5", "lenient"),
    ("She works 1 1/2 hours", "1.5", "lenient"),
    # Equal sides, of which one is a number.
    ("#### x = 18", "18", "lenient"),
    ("#### 36/2 ≈ 18", "18", "lenient"),
    ("#### 18 = 6*3", "18", "lenient"),
    ("#### 18 (= 9 * 2)", "18", "lenient"),
    ("#### (9 * 2 = 18)", "18", "lenient"),
    ("20 - 2 = 18\n#### 20 - 2", "18", "none"),
    ("9 * 2 makes 18; the answer is 9 * 2", "2", "none"),
    ("The answer is $3 \\times 4 = 12$.", "12", "lenient"),
    ("The answer is 12 ÷ 3 = 4.", "4", "lenient"),
    ("The answer is 12 x 3 = 36.", "36", "lenient"),
    ("The answer is 20% of 50 = 10.", "10", "lenient"),
    # Where the answer's clause ends.
    ("The final answer is 18. (Note that 3+4=7 eggs are used.)", "18", "lenient"),
    ("The answer is 18, since 16 - 7 = 9 eggs are left", "18", "lenient"),
    ("The answer is 18 because 9 * 2 = 18 and 3 + 4 = 7", "18", "lenient"),
    ("answer = 18\nThat is for 9 eggs", "18", "lenient"),
    ("**Answer: 18**\n\nSo she makes 18 dollars from 9 eggs.", "18", "lenient"),
    # Headings, and lines that are none.
    ("#### Step 1: eggs\n16-7=9\n#### 18", "18", "strict"),
    ("#### Calculation:\n3*4 = 12 and 12 + 6 = 18\n\nThe answer is 18.", "18", "lenient"),
    ("#### 2. **Find the revenue**\nIt is 18, of 9 eggs.\n\nSo 18.", "18", "lenient"),
    ("#### Solution\nShe has 16 eggs. 9*2 = 18.\n\nSo she makes $18.", "18", "lenient"),
    ("#### Cost of 3 apples\n3*2=6\nThe total cost is 6.", "6", "lenient"),
    ("#### Cost of 3 apples\nThat is six.", "3", "lenient"),
    ("#### 18\n\n#### Explanation\nShe sold 9 eggs for 2 dollars.", "18", "lenient"),
    ("#### The 3 friends pay 18 dollars", "18", "lenient"),
    ("#### Total: 18 dollars\nShe sells 9 eggs.", "18", "lenient"),
    ("#### Janet makes 18 dollars\nI hope that this helps!", "18", "lenient"),
    ("#### **Final Answer**\n\n$18", "18", "lenient"),
    ("####\n18", "18", "lenient"),
    ("####\n\nShe has 16 eggs.", "16", "lenient"),
    # Items of lists, and answers that go on.
    ("#### 18. She makes 2 dollars an egg.", "18", "lenient"),
    ("#### 18. That is 9 times 2.", "18", "lenient"),
    ("#### 3. The total is 18.", "18", "lenient"),
    ("#### 3) The total is **$18** per day.", "18", "lenient"),
    ("#### 3. Total: 18 dollars", "18", "lenient"),
    ("#### 3. The total is 9 * 2 = 18.", "18", "lenient"),
    ("#### 3. The total is 9 * 2.", "18", "none"),
    ("#### 3. She makes 18 dollars", "3", "lenient"),
    # Thoughts are no answers.
    ("<think>\n6? no, 5+2\n</think>\n\n5+2=7\n#### 7", "7", "strict"),
    ("5+2\n</think>\n\n#### 7", "7", "strict"),
    ("<think>\n#### 7\n</think>\n#### 8", "7", "wrong"),
    ("<think>It is 7.</think>I cannot say.", "7", "none"),
    ("<think>\n5+2=7\n#### 7", "7", "none"),
    ("<think>5+2</think>7, but <think>wait", "7", "none"),
]


def test_verdicts():
    for completion, answer, kind in VERDICTS:
        assert answers.judge(completion, answer) == kind, completion


# Of completions in the manner of GSM8K, those where math-verify differs, and why.
LAST_NUMBER = "math-verify takes the text's last number, ours the one that the answer's line gives"
WORKED_OUT = "math-verify works out what is left to work out"
DIFFERENT = {
    "#### 18 (9 eggs at $2 each)": LAST_NUMBER,
    "#### 18 dollars for 9 eggs": LAST_NUMBER,
    "#### 18\n\nLet me know if you need 2 or 3 more examples!": LAST_NUMBER,
    "Janet makes 18 dollars every day (9 eggs * 2 dollars).": "math-verify takes an operand",
    "First \\boxed{9} eggs are left, and so the answer is \\boxed{18}.": "it reads a set",
    "####18": "math-verify reads no number that touches the marker",
    "36 eggs are sold in pairs.\n#### 36/2": WORKED_OUT,
    "She makes $\\boxed{\\frac{36}{2}}$ dollars.": WORKED_OUT,
    "#### 9 * 2": WORKED_OUT,
    "She makes $\\boxed{9 \\times 2}$ dollars.": WORKED_OUT,
    "The answer is 16 + 2.": WORKED_OUT,
    "#### 20 - 2 dollars": WORKED_OUT,
    "#### 2^3": WORKED_OUT,
    "#### 6/4": WORKED_OUT,
    "The train leaves in the afternoon.\n#### 12:30": "math-verify takes the hour for a number",
    "The answer is 18 to 20 dollars.": "math-verify takes one end of a range for a number",
}


def test_verdicts_are_those_of_math_verify_but_for_known_differences():
    pytest.importorskip("math_verify")
    from math_verify_judge import accepts  # which imports it

    file = pathlib.Path(__file__).with_name("gsm8k_completions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        kind = answers.judge(row["completion"], row["answer"])
        assert kind == row["kind"], row
        differs = accepts(row["completion"], row["answer"]) != (kind in ("strict", "lenient"))
        assert differs == (row["completion"] in DIFFERENT), row
    assert DIFFERENT.keys() <= {row["completion"] for row in rows}


EXPRESSIONS = (
    "36/2; 36 / 2; \\frac{36}{2}; 6/4; 18/1; 9 * 2; 9*2; 9 × 2; 9 x 2; 9 \\times 2; 9 eggs * $2; "
    "(2 + 7) * 2; 16 + 2; 20 - 2; 20-2; 2^3; 2**3; 10^{2}; 1.8e1; 18-20; 18 – 20; 18 to 20; "
    "18 or 20; 18 dollars and 20 cents; 18, 20; 12:30; 3:1; 12/25/2024; 50% of 36; 1,00; 2\\pi; "
    "\\sqrt{4}; x^2; sqrt(324); log(18); 18²; 2³; 18 mod 5; 36 : 2; 36 divided by 2; 9 times 2; "
    "9 multiplied by 2; 20 minus 2; 16 plus 2; 36 over 2; 18~20; 18—20; 18...20; 18 | 20; 18 20; "
    "12h30; 18 hours 30 minutes; 5 feet 3 inches"
)


def test_nothing_is_worked_out():
    for expression in EXPRESSIONS.split("; "):
        for text in ("#### {}", "#### Answer: {} dollars", "\\boxed{{{}}}", "The answer is {}."):
            given = text.format(expression)
            assert answers.final_number(given) is None, given
            after_another = answers.final_number(f"She has 7 eggs.\n{given}")
            assert after_another in (None, 7), given
            assert answers.judge(f"{given}\n#### 18", "18") == "strict"


def test_what_was_cut_off_has_an_answer_only_where_it_says_so():
    numbers, words = [WordProblems()], [Tom(), Blend([Sums(), Tom()])]
    for tasks, text, kept in (
        (numbers, "16 - 7 = 9, and 9 *", False),
        (numbers, "#### Step 1: 16 - 7 = 9", False),
        (numbers, "#### Eggs per day\nShe has 16 eggs and eats 3", False),
        (numbers, "16 - 7 = 9\n#### 9", True),
        (numbers, "so \\boxed{9}, as we", True),
        (numbers, "<think>\\boxed{9}</think> There are 16 eggs and", False),
        (words, "Tom sees the box: box\n#### box\nSo the coins are in", True),
        (words, "#### yes\n", True),
        (words, "Tom sees the box: box\n####", False),
        (words, "#### \nTom sees the box", False),
        (words, "<think>Tom\n#### box</think> Tom sees", False),
        (words, "<think>Tom\n#### box", False),
        (words, "<think>Tom</think>\n#### box, because he", True),
    ):
        for task in tasks:
            assert task.answerable(text, cut=True) == (text if kept else "")
            assert task.answerable(text, cut=False) == text


@given(number=st.integers(-(10**9), 10**9), places=st.integers(0, 3))
def test_formatted_numbers_are_read_back(number, places):
    value = Fraction(number, 10**places)
    for text in (f"{float(value):.{places}f}", f"{float(value):,.{places}f}"):
        assert answers.parse_number(text) == value
        assert answers.strict_number(f"work\n#### {text}") == value
        assert answers.judge(f"#### {text}", str(value)) == "strict"


def test_a_completion_is_its_chain_of_thought_and_what_it_says_after_thinking():
    for completion, chain, visible in (
        ("3+4=7\n#### 7", "3+4=7", "3+4=7\n#### 7"),
        ("3+4=7", "3+4=7", "3+4=7"),
        ("a #### 1\nb\n\n#### 2", "a #### 1\nb", "a #### 1\nb\n\n#### 2"),
        ("#### Total\nIt is \\boxed{7}.", "#### Total\nIt is \\boxed{7}.", None),
        ("<think>\n3+4=7\n</think>\n\nSo it is\n#### 7", "<think>\n3+4=7", "\n\nSo it is\n#### 7"),
        ("3+4=7 </think>#### 7", "3+4=7", "#### 7"),
        ("<think>a</think>b<think>c</think>d", "<think>a</think>b<think>c", "d"),
        ("", "", ""),
    ):
        assert answers.chain_of_thought(completion) == chain
        assert answers.visible_text(completion) == (completion if visible is None else visible)
    for unfinished in ("<think>\n3 #### 4", "<think>a</think>#### 7\n<think>or", "<think>"):
        assert answers.visible_text(unfinished) is None
    assert answers.chain_of_thought("<think>\n3 #### 4 ") == "<think>\n3 #### 4"
