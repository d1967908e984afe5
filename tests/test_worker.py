"""launch/worker.sh on machines that lack what it needs, and signals to it before jexit runs."""

import shutil
import subprocess

import pytest

from stand_ins import ROOT

TOOLS = "bash dirname cut head sed tr sort paste sha256sum mkdir mv rm cat grep awk hostname flock"
pytestmark = pytest.mark.skipif(shutil.which("hostname") is None, reason="there is no hostname")


@pytest.fixture
def machine(tmp_path):
    """A checkout, and a PATH with the usual tools only; `log` holds what stubs were called with."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (tmp_path / "bin").mkdir()
    for name in TOOLS.split():
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def stub(machine, name, text=""):
    path = machine / name if "/" in name else machine / "bin" / name
    path.parent.mkdir(exist_ok=True)
    log = f'echo "{path.name} $*" >>"{machine}/log"'
    path.write_text(f"#!{shutil.which('bash')}\n{log}\n{text}\n")
    path.chmod(0o755)
    return path


def logged(machine):
    return (machine / "log").read_text().splitlines()


def bash(machine, *command, **env):
    environment = {
        "PATH": str(machine / "bin"),
        "HOME": str(machine),
        "JEXIT_EXTRAS": "tpu",
        "CHMOD": shutil.which("chmod"),
    }
    return subprocess.run(
        ["bash", *command],
        cwd=machine,
        env=environment | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def worker(machine, *arguments):
    return bash(machine, str(machine / "checkout" / "launch" / "worker.sh"), *arguments)


# A Python that can make environments.
GOOD = """
if [[ $2 == venv ]]; then
  mkdir -p "$3/bin"
  cat "$0" >"$3/bin/python"
  "$CHMOD" +x "$3/bin/python"
fi
"""


def test_an_image_with_an_old_python_gets_one_from_uv(machine):
    good = stub(machine, "uv/python3.12", GOOD)
    stub(
        machine,
        "python3",
        f'case "$*" in -c*) exit 1 ;; *"uv python find"*) echo {good} ;; esac',
    )
    done = worker(machine, "install")
    assert done.returncode == 0, done.stderr
    assert "there is no Python 3.11 to 3.13 on" in done.stderr
    calls = logged(machine)
    assert "python3 -m pip install --quiet --user uv>=0.9,<1" in calls
    assert "python3 -m uv python install --quiet 3.12" in calls
    (made,) = (call for call in calls if call.startswith("python3.12 -m venv"))
    assert made.endswith("/checkout/.venv")
    installs = [call for call in calls if "--editable" in call]
    assert len(installs) == 1 and installs[0].endswith("/checkout[tpu]")
    # What is there is used again.
    (machine / "log").unlink()
    again = worker(machine, "install")
    assert again.returncode == 0 and not (machine / "log").exists()


def test_gcsfuse_is_installed_where_it_is_missing(machine):
    fuse = machine / "bin" / "gcsfuse"
    stub(machine, "python3", GOOD)
    stub(machine, "mountpoint", "exit 1")
    stub(machine, "id", "echo 1000")
    stub(machine, "sudo", '"$@"')
    stub(machine, "curl", "echo a key")
    stub(machine, "tee", f'echo "tee wrote $(cat)" >>"{machine}/log"')
    for name in ("chown", "apt-get"):
        stub(machine, name)
    install = f'[[ "$*" != *gcsfuse* ]] || {{ cat "$0" >"{fuse}"; "$CHMOD" +x "{fuse}"; }}'
    stub(machine, "apt-get", install)
    mount = machine / "shared"
    options = ("--source=gs://a-bucket", f"--mount={mount}")
    done = worker(machine, "install", *options)
    assert done.returncode == 0, done.stderr
    calls = logged(machine)
    (repository,) = (call for call in calls if call.startswith("tee wrote deb"))
    assert "https://packages.cloud.google.com/apt gcsfuse-" in repository
    assert "tee wrote a key" in calls
    assert any(call.endswith("install gcsfuse") for call in calls if call.startswith("apt-get"))
    # The stub that apt-get made writes under the name of its own.
    assert any(call.endswith(f"a-bucket {mount}") for call in calls)


def test_a_directory_that_is_not_mounted_is_one_sentence(machine):
    done = worker(machine, "run", f"--directory={machine}/none", "--", "--config=configs/rl.py")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"jexit: there is no directory {machine}/none on ")
    assert line.endswith("; mount what all hosts share there.")


def test_nothing_to_stop_and_nothing_to_tell(machine):
    done = worker(machine, "status", "--state=.jexit")
    assert (done.returncode, done.stdout) == (0, "jexit-status: none\n")
    done = worker(machine, "stop", "--state=.jexit")
    assert done.returncode == 0 and "no run is going" in done.stderr


def test_a_signal_during_the_installation_can_be_continued(machine):
    stub(machine, "python3", f'{GOOD}[[ "$*" != *"pip install"* ]] || kill -TERM $PPID $WORKER')
    (machine / "shared").mkdir()
    script = (
        'export WORKER=$$; exec bash checkout/launch/worker.sh run "--directory=$PWD/shared"'
        " --state=state -- --config=configs/rl.py"
    )
    done = bash(machine, "-c", script, JEXIT_EXTRAS="")
    assert done.returncode == 42, done.stderr
    assert (machine / "state" / "code").read_text() == "42\n"
    assert not any("jexit.main" in call for call in logged(machine))
