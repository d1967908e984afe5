"""The verifier of math-verify, asked as this project's own is."""

import math_verify

from jexit.tasks import answers


def accepts(completion: str, answer: str) -> bool:
    """Whether math-verify finds the answer in what a completion says when it has done thinking."""
    text = answers.visible_text(completion)
    if text is None:
        return False
    return math_verify.verify(math_verify.parse(answer), math_verify.parse(text))
