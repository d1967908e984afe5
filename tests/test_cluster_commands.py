"""docs/clusters.md: each launch line prints its commands, and its config fills the whole slice."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from jexit.main import parse
from stand_ins import ROOT

PAGE = (ROOT / "docs" / "clusters.md").read_text()
LINES = re.findall(r"^bash launch/(?:tpu_vm|gke|slurm)\.sh .*$", PAGE, re.MULTILINE)


def split(line):
    """The launch script's options by name, and jexit's arguments."""
    words = shlex.split(line)
    options = [word.lstrip("-").partition("=") for word in words[2 : words.index("--")]]
    return {name: value for name, _, value in options}, words[words.index("--") + 1 :]


def chips(options):
    if "nodes" in options:
        return int(options["nodes"]) * int(options["gpus"])
    return int(options["type"].rpartition("-")[2])  # of v5litepod and v6e


def test_the_page_has_the_lines():
    said = {(options.get("type"), job[0]) for options, job in map(split, LINES)}
    for command in ("sft", "rl"):
        assert ("v5litepod-16", f"--config=configs/{command}.py:qwen3-4b") in said
        assert ("v6e-8", f"--config=configs/{command}.py:r1-distill-qwen-1.5b") in said
    scripts = {line.split()[1] for line in LINES}
    assert scripts == {"launch/tpu_vm.sh", "launch/gke.sh", "launch/slurm.sh"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_each_line_prints_its_commands():
    for line in LINES:
        done = subprocess.run(
            ["bash", "-c", line.replace(" -- ", " --dry-run -- ")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
        _, job = split(line)
        assert shlex.join(job) in done.stdout


def test_each_config_is_valid_and_takes_the_whole_slice(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in LINES:
        options, job = split(line)
        given = parse(["jexit", *job])
        command, preset, mesh = given.config.command, given.config.preset, given.config.mesh
        assert f"--config=configs/{command}.py:{preset}" in job
        # Relative: the scripts put it on the shared mount.
        assert given.workdir == pathlib.Path(f"runs/{command}-{preset}")
        assert mesh.data * mesh.fsdp * mesh.tensor == chips(options), line
