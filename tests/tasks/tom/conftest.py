import pytest

from jexit.tasks.base import Draw
from jexit.tasks.tom.stories import draw_problem
from jexit.tasks.tom.text import KINDS


@pytest.fixture(scope="session")
def stories():
    """Stories with their questions of every kind, drawn once: each takes some 20 ms."""
    return [
        draw_problem(Draw("stories", n), KINDS[n % len(KINDS)], people=(2, 4), moves=(3, 5))
        for n in range(180)
    ]
