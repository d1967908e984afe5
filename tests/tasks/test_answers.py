import random
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from jexit.tasks import Blend, Sums, Tom, WordProblems, answers

# Text that looks like answers, to reach the parser's corners more often than plain text does.
PIECES = ["####", " ", "\n", "$", "-", "\u2212", ",", ".", "/", "1", "0", "18", "999", "²", "٣"]
PIECES += ["\\boxed{", "}", "{", "\\frac{1}{2}", "dollars", "\x00", "\ud800"]
answer_like = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


PARSE_NUMBER = [
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
]


def test_parse_number():
    for text, value in PARSE_NUMBER:
        assert answers.parse_number(text) == value


LAST_NUMBER = [
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
    ("= -5", -5),
    ("costs $1,250.", 1250),
    ("nothing", None),
]


def test_last_number():
    for text, value in LAST_NUMBER:
        assert answers.last_number(text) == value


STRICT_NUMBER = [
    ("3+4=7\n#### 7", 7),
    ("#### 7", 7),
    ("#### 7\n", 7),
    ("#### $1,000.00", 1000),
    ("#### -3", -3),
    ("#### 18.", 18),
    ("#### 1/2", Fraction(1, 2)),
    ("#### 2 1/2", Fraction(5, 2)),
    ("#### -3 1/4", Fraction(-13, 4)),
    ("#### .5", Fraction(1, 2)),
    ("#### 7..", None),
    ("#### 36/2", None),
    ("#### 6/4", None),
    ("#### 7/1", None),
    ("#### 7/0", None),
    ("#### 1.5/2", None),
    ("#### 2 3/2", None),
    ("#### 5-7", None),
    ("#### 7:00", None),
    ("#### 1,00", None),
    ("#### 7 or 8", None),
    ("####7", None),
    ("#### 7 apples", None),
    ("#### 7\nSo seven.", None),
    ("so #### 7", None),
    ("#### ", None),
    ("##### 7", None),
    ("", None),
]


def test_strict_number():
    for text, value in STRICT_NUMBER:
        assert answers.strict_number(text) == value


JUDGE = [
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
    ("#### 36/2 ≈ 18", "18", "lenient"),
    ("\\boxed{\\pi \\cdot 2 \\approx 6.28}", "6.28", "lenient"),
    ("\\boxed{90^\\circ}", "90", "lenient"),
    ("\\boxed{18\\text{ cm}^2}", "18", "lenient"),
    ("20 - 2 = 18\n#### 20 - 2", "18", "none"),
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
    ("#### 2. **Find the revenue**\nIt is 18, of 9 eggs.\n\nSo 18.", "18", "lenient"),
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
    ("9 * 2 makes 18; the answer is 9 * 2", "2", "none"),
    ("\\boxed{18 = 6 \\cdot 3}", "18", "lenient"),
    ("#### 18 = 6*3", "18", "lenient"),
    ("#### 3\\frac{1}{2}", "3.5", "lenient"),
    ("#### Cost of 3 apples\n3*2=6\nThe total cost is 6.", "6", "lenient"),
    ("#### Cost of 3 apples\nThat is six.", "3", "lenient"),
    # Items of lists, and answers that go on.
    ("#### 18. She makes 2 dollars an egg.", "18", "lenient"),
    ("#### 18. That is 9 times 2.", "18", "lenient"),
    ("#### 3. The total is 18.", "18", "lenient"),
    ("#### 3. The total is 18.", "3", "wrong"),
    ("#### 3) The total is **$18** per day.", "18", "lenient"),
    ("#### 3. Total: 18 dollars", "18", "lenient"),
    ("#### 3. The total is 9 * 2 = 18.", "18", "lenient"),
    ("#### 3. The total is 9 * 2.", "18", "none"),
    ("#### 3. She makes 18 dollars", "3", "lenient"),
    ("#### 2. Find the price\n9 * 2 = 18", "18", "lenient"),
    ("#### Total: 18 dollars\nShe sells 9 eggs.", "18", "lenient"),
    ("#### Janet makes 18 dollars\nI hope that this helps!", "18", "lenient"),
    ("\\boxed{\\frac12}", "1/2", "lenient"),
    ("\\boxed{3\\frac12}", "3.5", "lenient"),
    ("She works 1 1/2 hours", "1.5", "lenient"),
]


def test_judge():
    for completion, answer, kind in JUDGE:
        assert answers.judge(completion, answer) == kind


NOTHING_IS_WORKED_OUT = [
    ("36/2", (18, 36, 2)),
    ("36 / 2", (18, 36, 2)),
    ("\\frac{36}{2}", (18, 36, 2)),
    ("6/4", ("1.5", 6, 4)),
    ("18/1", (18, 1)),
    ("9 * 2", (18, 9, 2)),
    ("9*2", (18, 9, 2)),
    ("9 × 2", (18, 9, 2)),
    ("9 x 2", (18, 9, 2)),
    ("9 \\times 2", (18, 9, 2)),
    ("9 eggs * $2", (18, 9, 2)),
    ("(2 + 7) * 2", (18, 2, 7)),
    ("16 + 2", (18, 16, 2)),
    ("20 - 2", (18, 20, 2)),
    ("20-2", (18, 20, 2)),
    ("2^3", (8, 2, 3)),
    ("2**3", (8, 2, 3)),
    ("10^{2}", (100, 10, 2)),
    ("1.8e1", (18, "1.8", 8, 1)),
    ("18-20", (18, 20)),
    ("18 – 20", (18, 20)),
    ("18 to 20", (18, 20)),
    ("18 or 20", (18, 20)),
    ("18 dollars and 20 cents", (18, 20)),
    ("18, 20", (18, 20)),
    ("12:30", (12, 30)),
    ("3:1", (3, 1)),
    ("12/25/2024", (12, 25, 2024)),
    ("50% of 36", (18, 50, 36)),
    ("1,00", (100, 1)),
    ("2\\pi", (2,)),
    ("\\sqrt{4}", (2, 4)),
    ("x^2", (2,)),
    ("sqrt(324)", (18, 324)),
    ("log(18)", (18,)),
    ("18²", (18, 324)),
    ("2³", (2, 8)),
    ("18 mod 5", (18, 5, 3)),
    ("36 : 2", (36, 2, 18)),
    ("36 divided by 2", (36, 2, 18)),
    ("9 multiplied by 2", (9, 2, 18)),
    ("20 minus 2", (20, 2, 18)),
    ("16 plus 2", (16, 2, 18)),
    ("9 times 2", (9, 2, 18)),
    ("36 over 2", (36, 2, 18)),
    ("18~20", (18, 20)),
    ("18—20", (18, 20)),
    ("18...20", (18, 20)),
    ("18 | 20", (18, 20)),
    ("18 20", (18, 20)),
    ("12h30", (12, 30)),
    ("18 hours 30 minutes", (18, 30)),
    ("5 feet 3 inches", (5, 3)),
]


def test_nothing_is_worked_out():
    for expression, values in NOTHING_IS_WORKED_OUT:
        texts = ["#### {}", "#### Answer: {} dollars", "\\boxed{{{}}}", "The answer is {}."]
        for text in texts:
            for before in ("", "She has 7 eggs.\n"):
                given = before + text.format(expression)
                for value in values:
                    assert answers.judge(given, str(value)) not in ("strict", "lenient"), given
                assert answers.judge(f"{given}\n#### 18", "18") == "strict"


CUT_OFF = [
    ("16 - 7 = 9, and 9 *", False),
    ("#### Step 1: 16 - 7 = 9", False),
    ("#### Eggs per day\nShe has 16 eggs and eats 3", False),
    ("16 - 7 = 9\n#### 9", True),
    ("so \\boxed{9}, as we", True),
    ("<think>\\boxed{9}</think> There are 16 eggs and", False),
    ("<think>16 - 7</think>\n#### 9", True),
    ("", False),
]


def test_what_was_cut_off_has_an_answer_only_where_it_says_so():
    for text, kept in CUT_OFF:
        assert WordProblems().answerable(text, cut=True) == (text if kept else "")
        assert WordProblems().answerable(text, cut=False) == text


CUT_OFF_WORDS = [
    ("Tom sees the box: box\n#### box\nSo the coins are in", True),
    ("#### yes\n", True),
    ("Tom sees the box: box\n####", False),
    ("#### \nTom sees the box", False),
    ("<think>Tom\n#### box</think> Tom sees", False),
    ("<think>Tom\n#### box", False),
    ("<think>Tom</think>\n#### box, because he", True),
    ("Tom sees the box", False),
]


def test_words_that_were_cut_off_are_an_answer_where_they_are_marked():
    for text, kept in CUT_OFF_WORDS:
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
        assert answers.judge(f"#### {text}", str(value)) == "strict"


VISIBLE_TEXT = [
    ("#### 7", "#### 7"),
    ("<think>3+4</think>#### 7", "#### 7"),
    ("3+4\n</think>\n\n#### 7", "\n\n#### 7"),
    ("<think>a</think>b<think>c</think>d", "d"),
    ("<think>3+4 is\n#### 7", None),
    ("<think>a</think>#### 7\n<think>or", None),
    ("<think>", None),
    ("</think>", ""),
    ("", ""),
]


def test_visible_text():
    for completion, visible in VISIBLE_TEXT:
        assert answers.visible_text(completion) == visible


CHAIN_OF_THOUGHT = [
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
]


def test_chain_of_thought():
    for completion, chain in CHAIN_OF_THOUGHT:
        assert answers.chain_of_thought(completion) == chain


THOUGHTS_ARE_NO_ANSWERS = [
    ("<think>\n6? no, 5+2\n</think>\n\n5+2=7\n#### 7", "strict"),
    ("5+2\n</think>\n\n#### 7", "strict"),
    ("<think>7</think>It is \\boxed{7}.", "lenient"),
    ("<think>\n#### 7\n</think>\n#### 8", "wrong"),
    ("<think>It is 7.</think>I cannot say.", "none"),
    ("<think>\n5+2=7\n#### 7", "none"),
    ("<think>5+2</think>7, but <think>wait", "none"),
]


def test_thoughts_are_no_answers():
    for completion, kind in THOUGHTS_ARE_NO_ANSWERS:
        assert answers.judge(completion, "7") == kind


def _random_text(draw):
    pieces = [*PIECES, "<think>", "</think>", "9" * 70, "1,234", "(", "٣٤", "೧", "Ⅷ", "𝟛", "\u200b"]
    if draw.random() < 0.5:
        end = "\n#### 18" if draw.random() < 0.1 else ""
        return "".join(draw.choices(pieces, k=draw.randrange(24))) + end
    return "".join(chr(draw.randrange(1, 0x3000)) for _ in range(draw.randrange(24)))


# Under a second a 10,000.
def test_twenty_thousand_random_texts_are_judged():
    for seed in range(2):
        draw, kinds = random.Random(seed), dict.fromkeys(("strict", "lenient", "wrong", "none"), 0)
        for _ in range(10_000):
            text = _random_text(draw)
            kinds[answers.judge(text, "18")] += 1
            number = answers.final_number(text)
            assert number is None or isinstance(number, Fraction)
            assert text.startswith(answers.chain_of_thought(text))
        assert min(kinds.values()) > 0, "the texts reach every verdict"
