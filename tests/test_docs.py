"""README and docs: what commands, links and examples name exists, and the site builds."""

import ast
import collections
import contextlib
import importlib.util
import io
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest

import jexit
from jexit.config import Config, check_key
from jexit.main import parse
from jexit.presets import PRESETS
from jexit.sweep.plan import Sweep
from tolerances import LOGPROBS

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
MOST_WORDS = 900
PAGES = [
    *(README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = ("mkdocs", "pip", "pytest", "ruff")  # other people's modules that pages may run

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)*)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
PATH = re.compile(r"(?:\.ci|configs|convert|docs|examples|jexit|launch|studies|tests)/[\w./-]*")
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python (?:-m |\S+\.py)|bash |jexit )")
PATTERN = re.compile("COMMAND|PRESET|TOPOLOGY")  # in commands that stand for others


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def blocks(page, language):
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def inline(page):
    return [" ".join(code.split()) for code in CODE.findall(prose(page))]


def commands(page):
    """Every command of ours on a page, as words; what a comment or a variable adds is left out."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    for line in (*lines, *inline(page)):
        if COMMAND.match(line):
            words = shlex.split(line, comments=True)
            yield [word for word in words if not re.match(r"[A-Z_]+=", word)]


def options_of(source):
    """The options that a script's parser has."""
    tree = ast.walk(ast.parse(source.read_text()))
    words = (node.value for node in tree if isinstance(node, ast.Constant))
    return {word for word in words if isinstance(word, str) and word.startswith("--")}


def check_script(source, arguments):
    assert source.is_file(), f"{source} does not exist"
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    assert not given - options_of(source), f"{source.name} has no {given - options_of(source)}"


def check_module(name, arguments):
    if name.partition(".")[0] in TOOLS:
        return
    if name == "jexit.main":
        check_job(arguments)
        return
    source = ROOT / name.replace(".", "/")
    source = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
    check_script(source, arguments)


def check_job(arguments):
    """Parses what jexit is given: nothing where a command is only named, or stands for others."""
    if arguments and not PATTERN.search(" ".join(arguments)):
        parse(["jexit", *arguments])


def check_bash(script, arguments):
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "launch/run.sh":
        check_job(arguments)
    elif script == "launch/sweep.sh":
        sweep = Sweep.parse(arguments)
        for key in (*sweep.grid, *sweep.fixed, *sweep.evaluation_settings):
            check_key(f"config.{key}")
        for config in filter(None, (sweep.config, sweep.evaluation)):
            parse(["jexit", f"--config={config}"])
    elif script == "launch/test.sh":
        options = PROJECT["tool"]["pytest"]["ini_options"]
        markers = {marker.partition(":")[0] for marker in options["markers"]}
        for before, word in itertools.pairwise(["", *arguments]):
            assert before != "-m" or word in markers, f"there is no marker {word}"
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
    elif "--" in arguments:  # the cluster's options are tried by test_cluster_commands
        check_job(arguments[arguments.index("--") + 1 :])


def anchors(page):
    """The anchors of a page's headings, by the rule of GitHub and by that of MkDocs."""
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        yield re.sub(r"\s", "-", words)
        yield re.sub(r"[-\s]+", "-", words.encode("ascii", "ignore").decode())


def test_the_readme_is_short():
    words = len(README.read_text().split())
    assert words <= MOST_WORDS, f"README.md has {words} words; move some to docs/"


def test_commands_name_files_modules_options_and_settings_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = collections.Counter()
    for page in PAGES:
        for program, *words in commands(page):
            found[program] += 1
            if program == "bash":
                check_bash(words[0], words[1:])
            elif program == "python" and words[0] == "-m":
                check_module(words[1], words[2:])
            elif program == "python":
                check_script(ROOT / words[0], words[1:])
            else:
                assert program in PROJECT["project"].get("scripts", {}), f"no command {program}"
    assert found["bash"] > 10 and found["python"] > 20, "the test has lost sight of the commands"


def test_files_and_settings_in_the_text_exist():
    sections = set(Config.__dataclass_fields__)
    for page in PAGES:
        for code in inline(page):
            path = code.partition(":")[0]
            if PATH.fullmatch(path) and not PATTERN.search(path):
                assert (ROOT / path).exists(), f"{page.name}: {code}"
            setting = re.fullmatch(r"(?:--config\.)?(([a-z_]+)\.[a-z_0-9]+)(?:=.*)?", code)
            if setting and setting[2] in sections and not setting[1].endswith((".py", ".json")):
                check_key(f"config.{setting[1]}")


def test_the_guide_to_the_tests_names_tests():
    guide = ROOT / "tests" / "README.md"
    for code in inline(guide):
        if code.endswith((".py", "/")) and " " not in code:
            assert (guide.parent / code).exists(), code


def test_links_lead_somewhere():
    for page in PAGES:
        for link in LINK.findall(prose(page)):
            if re.match(r"https?://", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            both = collections.Counter(anchors(target))[anchor] > 1 if anchor else True
            assert both, f"{page.name}: {link} is no heading, or none for both GitHub and MkDocs"


def test_the_layout_of_the_readme_is_the_tree():
    text = README.read_text().partition("## Layout")[2].partition("\n## ")[0]
    named = re.findall(r"(?:^|; )((?:configs|convert|jexit|tests)/[\w/]*)", text, re.MULTILINE)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).is_dir(), name


def test_every_preset_and_module_of_the_public_api_is_documented():
    models = (ROOT / "docs" / "models.md").read_text()
    assert not {preset for preset in PRESETS if f"`{preset}`" not in models}
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert not {name for name in jexit.__all__ if f"::: jexit.{name}\n" not in reference} - {
        "Policy",
        "__version__",
    }


def test_the_readme_example_prints_what_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = blocks(README, "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    texts, depths = zip(*(pair.rsplit(":", 1) for pair in printed.getvalue().split()), strict=True)
    said = [pair.rsplit(":", 1)[0] for pair in blocks(README, "")[1].split()]
    assert "".join(texts) == "".join(said) == "+45+9####9"
    # The depths are drawn: rounding on another processor may change them.
    assert depths[0] == "8" and set(depths) <= {"1", "2", "3", "4", "6", "8"}


def test_the_recipe_scores_a_completion_as_it_was_generated(monkeypatch):
    monkeypatch.chdir(ROOT)
    (recipe,) = blocks(ROOT / "docs" / "method.md", "python")
    made = {}
    exec(recipe, made)
    gen, start = made["gen"], len(made["prompt"]) - 1
    assert min(gen.depths[0]) < 8, "nothing has left early"
    logits_TV = np.asarray(made["out"].logits_BTV[0, start:-1], np.float64)
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    scored_T = np.take_along_axis(logprobs_TV, np.asarray(gen.tokens[0])[:, None], axis=1)[:, 0]
    assert np.abs(scored_T - gen.logprobs[0]).max() < LOGPROBS
    assert made["out"].depth_BT[0, start:-1].tolist() == gen.depths[0]


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference" / "index.html").read_text()
    for name in ("jexit.load", "jexit.generate", "jexit.kernels.exit_kl.api.exit_kl"):
        assert f'id="{name}"' in page
