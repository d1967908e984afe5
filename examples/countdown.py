"""Countdown, an example of your own task in one file: make a number from others, each used once.

    python -m jexit.main --config=configs/rl.py --config.task.name=examples/countdown.py \
        --config.steps=50 --config.rl.accuracy_floor=0.3 --workdir=runs/countdown

The shipped model has never seen such a problem. The command takes some minutes on two CPU cores. In
the course of the run `reward/uses_them` rises first, and then `reward/makes_it`. The accuracy floor
withholds the depth penalty until 30 % of the answers are correct. Set
`--config.task.options.numbers=3` for harder problems.
"""

import ast
import itertools
import operator
import random

import jexit

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def makes_it(completions, target, numbers, **columns):
    """Returns 1 for an expression that uses each number once and equals the target, and else 0."""
    return [
        float(used == sorted(given) and value == wanted)
        for (value, used), wanted, given in zip(
            map(read, completions), target, numbers, strict=True
        )
    ]


def uses_them(completions, numbers, **columns):
    """Returns the overlap of the expression's numbers with the given ones, from 0 to 1."""
    scores = []
    for (_, used), given in zip(map(read, completions), numbers, strict=True):
        shared = sum(min(used.count(n), given.count(n)) for n in set(given))
        scores.append(shared / max(len(used), len(given)))
    return scores


def read(completion):
    """Returns the value of the first line up to an equals sign, and its sorted numbers."""
    used = []

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        raise ValueError("not a sum, a difference or a product")

    line = completion.strip().partition("\n")[0].partition("=")[0].strip()
    try:
        found = value(ast.parse(line[:100], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, []
    return found, sorted(used)


def problems(numbers, seed):
    """Yields problems with numbers from 2 to 12 and a target that is made from them at random."""
    draw = random.Random(seed)
    for _ in itertools.repeat(None):
        given = [draw.randint(2, 12) for _ in range(numbers)]
        target = given[0]
        for number in given[1:]:
            target = draw.choice(list(OPERATIONS.values()))(target, number)
        if target > 0:
            shown = ", ".join(map(str, given[:-1])) + f" and {given[-1]}"
            question = f"Make {target} from {shown}."
            yield {"question": question, "target": target, "numbers": given}


def task(numbers: int = 2, rows: int = 4000, seed: int = 0):
    """Makes the task that `config.task.name` names. Its arguments are `config.task.options`."""
    return jexit.rows_task(
        train=list(itertools.islice(problems(numbers, seed), rows)),
        prompt="question",
        rewards={makes_it: 1.0, uses_them: 0.2},
        correct=makes_it,
    )
