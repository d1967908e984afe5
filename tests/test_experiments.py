"""The studies' files: that they build, and that the commands in their heads are commands."""

import json
import pathlib
import re
import runpy
import shlex
import subprocess

import pytest
from ml_collections import ConfigDict

from jexit.config import Config, check_key
from jexit.sweep.plan import Sweep

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = sorted((ROOT / "configs" / "experiments").glob("*.py"))


def config_of(name: str) -> ConfigDict:
    path, _, variant = name.partition(":")
    made = runpy.run_path(str(ROOT / path))["get_config"]
    return made(variant) if variant else made()


def head(path: pathlib.Path) -> str:
    """The file's head with every command on a line."""
    return re.sub(r"\s*\\\n\s*", " ", re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)[1])


def scripts(path: pathlib.Path) -> list[pathlib.Path]:
    return [ROOT / name for name in re.findall(r"bash (studies/\w+\.sh)", head(path))]


def sweeps(path: pathlib.Path) -> list[Sweep]:
    lines = re.findall(r"bash launch/sweep\.sh (.*)", head(path))
    return [Sweep.parse(shlex.split(line)) for line in lines]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_builds(path):
    config = Config.from_dict(config_of(f"configs/experiments/{path.name}"))
    assert json.dumps(config.to_dict())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_commands_of_a_study_name_files_and_settings_that_there_are(path):
    for sweep in sweeps(path):
        config = Config.from_dict(config_of(sweep.config))
        assert config.eval.problems > 0  # a table has something to tell
        if sweep.evaluation:
            assert Config.from_dict(config_of(sweep.evaluation)).command == "eval"
        for key in (*sweep.grid, *sweep.fixed, *sweep.evaluation_settings):
            check_key(f"config.{key}")
    for key in re.findall(r"--config\.([\w.]+)=|`([a-z_]+\.[a-z_]+)=", head(path)):
        check_key(f"config.{''.join(key)}")
    for name in re.findall(r"configs/[\w/]+\.py(?::\w+)?", head(path)):
        config_of(name)


def test_every_study_has_a_command():
    for path in STUDIES:
        assert sweeps(path) or scripts(path), path


def test_scripts_of_studies_run_stages_and_set_settings_that_there_are():
    for path in STUDIES:
        for script in scripts(path):
            text = script.read_text().replace("\\\n", " ")
            assert f'config="$checkout/configs/experiments/{path.name}"' in text
            subprocess.run(["bash", "-n", script], check=True)
            stages = re.findall(r'"\$config:(\w+)"', text)
            assert len(stages) > 2
            for stage in stages:
                Config.from_dict(config_of(f"configs/experiments/{path.name}:{stage}"))
            for key in re.findall(r"(?:--config\.| )([a-z_]+(?:\.[a-z_]+)+)=", text):
                check_key(f"config.{key}")


def test_measures_of_something_unknown_are_refused():
    with pytest.raises(ValueError, match="choose tiny, word_problems"):
        config_of("configs/experiments/measures.py:gsm8k")
