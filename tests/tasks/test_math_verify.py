"""The verifier of numbers beside math-verify, on completions in the manner of GSM8K."""

import json
import pathlib

import pytest

from jexit.tasks import answers

pytest.importorskip("math_verify")

from math_verify_judge import accepts  # which imports it

COMPLETIONS = [
    json.loads(line)
    for line in pathlib.Path(__file__).with_name("gsm8k_completions.jsonl").read_text().splitlines()
]

# Where the two differ, and why.
LAST_NUMBER = "math-verify takes the text's last number, ours the one that the answer's line gives"
WORKED_OUT = "math-verify works out what is left to work out"
DIFFERENT = {
    "#### 18 (9 eggs at $2 each)": LAST_NUMBER,
    "#### 18 dollars for 9 eggs": LAST_NUMBER,
    "#### 18\n\nLet me know if you need 2 or 3 more examples!": LAST_NUMBER,
    "Janet makes 18 dollars every day (9 eggs * 2 dollars).": (
        "math-verify takes an operand, ours the last number that is none"
    ),
    "First \\boxed{9} eggs are left, and so the answer is \\boxed{18}.": (
        "math-verify reads two boxes as a set, ours the last one"
    ),
    "####18": "math-verify reads no number that touches the marker",
    "36 eggs are sold in pairs.\n#### 36/2": WORKED_OUT,
    "She makes $\\boxed{\\frac{36}{2}}$ dollars.": WORKED_OUT,
    "#### 9 * 2": WORKED_OUT,
    "She makes $\\boxed{9 \\times 2}$ dollars.": WORKED_OUT,
    "The answer is 16 + 2.": WORKED_OUT,
    "#### 20 - 2 dollars": WORKED_OUT,
    "#### 2^3": WORKED_OUT,
    "#### 6/4": WORKED_OUT,
    "The train leaves in the afternoon.\n#### 12:30": (
        "math-verify takes the hour of a time for a number"
    ),
    "The answer is 18 to 20 dollars.": "math-verify takes one end of a range for a number",
}


def test_completions_are_judged_as_listed():
    for row in COMPLETIONS:
        kind = answers.judge(row["completion"], row["answer"])
        assert kind == row["kind"], row
        differs = accepts(row["completion"], row["answer"]) != (kind in ("strict", "lenient"))
        assert differs == (row["completion"] in DIFFERENT), row


def test_the_list_names_completions_that_are_there():
    assert set(DIFFERENT) <= {row["completion"] for row in COMPLETIONS}
    assert len(COMPLETIONS) >= 60
