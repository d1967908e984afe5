"""The shipped tokenizer is what its script builds from the tasks' text."""

import re
import subprocess
import sys

import studies.tiny_tokenizer as builder
from jexit.tasks import make_task
from small_runs import ROOT

TINY = ROOT / "jexit" / "assets" / "tiny"


def test_the_shipped_files_are_what_the_script_writes(tmp_path):
    command = [sys.executable, "studies/tiny_tokenizer.py", f"--target={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in written:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_every_word_of_the_tasks_is_one_token():
    tokenizer = builder.build()
    for task, settings in (("sums", {"steps": "mixed"}), ("tom", {"steps": "mixed"}),
                           ("word_problems", {})):  # fmt: skip
        problems = make_task(task, **settings)
        for index in range(200):
            problem = problems.problem("train", builder.STORIES + index)
            for piece in re.findall(builder.PIECES, f"{problem.prompt}\n{problem.completion}"):
                assert len(tokenizer.encode(piece).ids) == 1, piece
