"""launch/gke.sh against stand-ins: what xpk is given, and how its containers end."""

import os
import pwd
import shutil
import signal
import subprocess

import pytest

from stand_ins import ROOT, StandIns

JOB = ["--", "--config=configs/sft.py:r1-distill-qwen-1.5b", "--config.mesh.fsdp=8"]


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "shared").mkdir()
    return StandIns(tmp_path, hosts=1)


def launch(cluster, *more, job=JOB):
    return cluster.run(
        "gke.sh",
        *("--name=trial", "--cluster=ours", "--zone=us-east5-b", "--type=v6e-8"),
        *("--storage=bucket", f"--mount={cluster.directory}/shared", *more, *job),
    )


def flag(call, name):
    (value,) = (a.partition("=")[2] for a in call if a.startswith(f"--{name}="))
    return value


# How xpk wraps the command of a workload: in a shell that passes SIGTERM on.
WRAPPER = """
_sigterm() (kill -SIGTERM $! 2>/dev/null;); trap _sigterm SIGTERM
({}) & PID=$!
while kill -0 $PID 2>/dev/null; do sleep 0.1; done
wait $PID
"""


def start_container(cluster):
    """Starts what xpk was told to start, in a copy of the directory that it was given."""
    (call,) = cluster.calls("xpk")
    home = cluster.directory / "hosts" / "0"
    app = home / "app"
    if not app.exists():
        home.mkdir(parents=True)
        shutil.copytree(flag(call, "script-dir"), app)
    return subprocess.Popen(
        ["bash", "-c", WRAPPER.replace("{}", flag(call, "command"))],
        cwd=app,
        env=cluster.environment(HOME=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_workload_is_submitted_with_the_program_and_its_command(cluster):
    done = launch(cluster, "--env=TEST_WORD=it's", "--option=--priority=high", "--project=p")
    assert done.returncode == 0, done.stderr
    (call,) = cluster.calls("xpk")
    assert call[:7] == [
        *("workload", "create", "--workload=trial", "--cluster=ours", "--zone=us-east5-b"),
        *("--project=p", "--tpu-type=v6e-8"),
    ]
    assert flag(call, "restart-on-exit-codes") == "42"
    assert flag(call, "max-restarts") == "100"
    assert flag(call, "termination-grace-period-seconds") == "180"
    assert flag(call, "storage") == "bucket"
    assert flag(call, "base-docker-image") == "python:3.12"
    assert "--priority=high" in call
    container = start_container(cluster)
    container.communicate(timeout=60)
    assert container.returncode == 0
    (run,) = (record for record in cluster.records() if record["name"] == "jexit")
    assert run["args"] == JOB[1:]
    assert run["cwd"] == str(cluster.directory / "shared")
    assert run["env"] == {"TEST_WORD": "it's"}
    (install,) = (c for c in cluster.calls("python") if c[:3] == ["-m", "pip", "install"])
    assert install[-1].endswith("/app[tpu]")


def test_only_ends_that_can_be_continued_start_the_workload_again(cluster):
    assert launch(cluster).returncode == 0
    for code, container in ((1, 1), (3, 42), (137, 42)):
        cluster.plan(jobs={"0": [code]})
        process = start_container(cluster)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == container
        assert f"jexit ended with {code}, this host with {container}." in errors
    # A container that is told to end has its run save first.
    cluster.plan(jobs={"0": ["wait"]})
    process = start_container(cluster)
    cluster.waits_for("waiting")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 42
    assert (cluster.directory / "hosts/0/signals").read_text() == "SIGTERM", "once"


def test_fetch_and_delete_alone(cluster):
    done = cluster.run(
        "gke.sh",
        *("fetch", "--name=trial", "--cluster=ours", "--zone=z", "--shared=gs://a-bucket"),
        *("--mount=/x", f"--results={cluster.directory}/r", *JOB),
    )
    assert done.returncode == 0, done.stderr
    place = ("--name=trial", "--cluster=ours", "--zone=z")
    assert cluster.run("gke.sh", "delete", *place).returncode == 0
    (delete,) = cluster.calls("xpk")
    assert delete == [
        *("workload", "delete", "--workload=trial", "--cluster=ours", "--zone=z", "--force")
    ]


def test_a_dry_run_prints_what_a_run_does_and_runs_nothing(cluster):
    options = ("--wait", "--shared=gs://a-bucket", f"--results={cluster.directory}/results")
    printed = launch(cluster, "--dry-run", *options)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert cluster.records() == []
    assert not (cluster.directory / "results").exists()
    subprocess.run(
        ["bash", "-c", printed.stdout],
        cwd=cluster.directory,
        env=cluster.environment(),
        check=True,
        capture_output=True,
    )
    by_hand = cluster.calls("xpk") + cluster.calls("gcloud")
    (cluster.directory / "calls.jsonl").unlink()
    assert launch(cluster, *options).returncode == 0
    (_, wait), (fetch,) = cluster.calls("xpk"), cluster.calls("gcloud")
    assert cluster.calls("xpk") + [fetch] == by_hand
    assert wait == [
        *("workload", "list", "--cluster=ours", "--zone=us-east5-b"),
        "--wait-for-job-completion=trial",
    ]
    run, results = "runs/sft-r1-distill-qwen-1.5b", cluster.directory / "results"
    assert fetch[:4] == ["storage", "rsync", f"gs://a-bucket/{run}", f"{results}/{run}"]


def test_a_wrong_command_line_is_one_sentence_and_creates_nothing(cluster):
    for wrong, job, said in [
        ("--type=h100", JOB, "--type is 'h100'; give v5litepod-N or v6e-N"),
        (
            "--type=v6e-16",
            JOB,
            "the mesh is data 1 × fsdp 8 × tensor 1 = 8 devices and v6e-16 has 16; make",
        ),
        ("--shared=bucket", JOB, "--shared is 'bucket'; it is gs://BUCKET[/PATH], or left out."),
        ("--nodes=2", JOB, "unknown option '--nodes=2'; the options are --name, --cluster,"),
        ("--type=v6e-8 16", JOB, "--type is 'v6e-8 16'; give v5litepod-N or v6e-N"),
        ("--wait", [*JOB, "--workdir", "/app/runs"], "--workdir is '/app/runs', outside of"),
    ]:
        done = launch(cluster, wrong, job=job)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"jexit: {said}")
    assert cluster.records() == []


def test_without_a_home_the_system_says_where_it_is(cluster):
    """As in a container or a cron job."""
    given = ["--name=trial", "--cluster=c", "--zone=z", "--type=v6e-8", "--storage=s", "--dry-run"]
    without = cluster.environment()
    del without["HOME"]
    for environment in (without, without | {"HOME": ""}):
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "gke.sh"), *given, "--mount=/mnt/jexit", *JOB],
            cwd=cluster.directory,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        scratch = f"{pwd.getpwuid(os.getuid()).pw_dir}/.cache/jexit/trial"
        assert done.stdout.startswith(f"mkdir -p {scratch}\n")
