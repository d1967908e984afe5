"""Where the verifier of numbers and math-verify differ, on the completions of a real model.

    python -m jexit.main --config=configs/eval.py:qwen2.5-0.5b --workdir=runs/base \
        --config.model.path=MODEL_DIR --config.task.name=gsm8k --config.eval.split=train \
        --config.eval.problems=2000 --config.eval.heat_maps=2000 \
        --config.eval.policies='("full",)' --config.eval.measures='()'
    python tests/benchmarks/verifier_agreement.py runs/base/completions.json

Takes the completions.json of evaluations, the samples.jsonl of RL runs, and any JSONL with
`answer` and `completion` in each row; a `prompt` is shown if there is one. Prints each disagreement
with what either verifier read, then how often each of the two accepts. Rows whose answer is no
number are counted and left out.
"""

import argparse
import collections
import json
import pathlib
import sys

import math_verify

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from jexit.tasks import answers
from math_verify_judge import accepts

SHOWN = 300  # characters of a prompt, and of a completion from its end


def read_rows(file: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a JSON list or of a JSONL file."""
    text = file.read_text("utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()

    rows = [row for file in arguments.files for row in read_rows(file)]
    judged = [row for row in rows if answers.parse_number(row["answer"]) is not None]
    counts: collections.Counter[tuple[bool, bool]] = collections.Counter()
    for number, row in enumerate(judged, start=1):
        answer, completion = row["answer"], row["completion"]
        kind = answers.judge(completion, answer)
        ours, theirs = kind in ("strict", "lenient"), accepts(completion, answer)
        counts[ours, theirs] += 1
        if ours == theirs:
            continue
        read = math_verify.parse(answers.visible_text(completion) or "")
        print(f"{number}: the answer is {answer}")
        print(f"  jexit: {kind}, reads {answers.final_number(completion)}")
        print(f"  math-verify: {'accepts' if theirs else 'refuses'}, reads {read}")
        if "prompt" in row:
            print(f"  prompt: {row['prompt'][:SHOWN]!r}")
        print(f"  completion: {completion[-SHOWN:]!r}\n")

    print(f"{len(judged)} completions, {len(rows) - len(judged)} left out")
    for (ours, theirs), count in sorted(counts.items(), reverse=True):
        names = [name for name, said in (("jexit", ours), ("math-verify", theirs)) if said]
        print(f"  accepted by {' and '.join(names) or 'neither'}: {count}")


if __name__ == "__main__":
    main()
