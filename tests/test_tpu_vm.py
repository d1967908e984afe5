"""launch/tpu_vm.sh against stand-ins: create or reuse, run on every worker, resume, fetch."""

import os
import shutil
import signal
import subprocess

import pytest

from stand_ins import ROOT, StandIns

pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")

ALREADY = "this run is going already; following it"


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "shared").mkdir()
    return StandIns(tmp_path)


def options(cluster, *more, type="v5litepod-16", shared="gs://a-bucket/jexit"):
    return [
        *("--name=trial", "--zone=us-west4-a", f"--type={type}", f"--shared={shared}"),
        *(f"--mount={cluster.directory}/shared", f"--results={cluster.directory}/results"),
        *more,
    ]


JOB = ["--", "--config=configs/rl.py:qwen3-4b", "--config.mesh.fsdp=16", "--config.task.path=a b"]


def launch(cluster, *more, job=JOB, **named):
    return cluster.run("tpu_vm.sh", *options(cluster, *more, **named), *job)


def verbs(cluster):
    """What gcloud was asked, in order."""
    calls = [call for call in cluster.calls("gcloud") if call[0] == "compute"]
    return [
        f"{'queue ' if call[2] == 'queued-resources' else ''}{call[3]}"
        for call in calls
        if call[3] != "describe"
    ]


def changing(cluster):
    return [verb for verb in verbs(cluster) if verb.split()[-1] in ("create", "delete", "start")]


def test_a_slice_is_created_and_the_job_runs_on_all_workers(cluster):
    done = launch(cluster, "--env=TEST_WORD=two words", "--spot", "--option=--network=mine")
    assert done.returncode == 0, done.stderr
    assert verbs(cluster) == ["create", "scp", "ssh", "ssh", "ssh", "ssh"]
    (create,) = (call for call in cluster.calls("gcloud") if call[3] == "create")
    assert create[2:] == [
        *("tpu-vm", "create", "trial", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"),
        *("--version=v2-alpha-tpuv5-lite", "--spot", "--network=mine"),
    ]
    runs = [record for record in cluster.records() if record["name"] == "jexit"]
    assert sorted(record["host"] for record in runs) == ["0", "1"]
    for record in runs:
        assert record["args"] == JOB[1:]
        assert record["cwd"] == str(cluster.directory / "shared")
        assert record["env"] == {"TEST_WORD": "two words"}
    assert "a run on host 0" in done.stdout and "a run on host 1" in done.stdout
    mounts = cluster.calls("gcsfuse")
    assert len(mounts) == 2
    assert mounts[0][-3:] == ["--only-dir=jexit", "a-bucket", f"{cluster.directory}/shared"]
    assert "--metadata-cache-ttl-secs=0" in mounts[0]
    installs = [c for c in cluster.calls("python") if c[:3] == ["-m", "pip", "install"]]
    assert [c[-1].endswith("/jexit[tpu]") for c in installs] == [True, True]
    (fetch,) = (call for call in cluster.calls("gcloud") if call[0] == "storage")
    run = "runs/rl-qwen3-4b"
    assert fetch[2:4] == [f"gs://a-bucket/jexit/{run}", f"{cluster.directory}/results/{run}"]
    assert "--exclude=(.*/)?checkpoints/.*" in fetch


def test_a_slice_that_is_ready_is_used_and_one_of_another_type_is_not(cluster):
    cluster.plan(node="READY v5litepod-16")
    assert launch(cluster).returncode == 0
    assert changing(cluster) == []
    done = launch(cluster, type="v6e-16")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "jexit: trial is a v5litepod-16 and --type is v6e-16; delete it first, or choose another "
        "--name."
    )
    assert changing(cluster) == []


def test_a_slice_that_is_gone_is_made_again_and_the_run_goes_on_with_the_same_command(cluster):
    """It is gone from the start, and once more when it is preempted."""
    cluster.plan(node="TERMINATED v5litepod-16", jobs={"0": [3], "1": ["preempt"]})
    done = launch(cluster)
    assert done.returncode == 0, done.stderr
    assert changing(cluster) == ["delete", "create", "delete", "create"]
    runs = cluster.calls("jexit")
    assert sorted(runs[:2]) == sorted(runs[2:])
    assert "trial is gone; making it again" in done.stderr
    assert verbs(cluster).count("scp") == 2, "the new slice needs the code again"


def test_passing_states_are_waited_for_and_a_stopped_slice_is_started(cluster):
    cluster.plan(node="STOPPED v5litepod-16", states=["CREATING x", "REPAIRING x", "REPAIRING x"])
    done = launch(cluster)
    assert done.returncode == 0
    assert changing(cluster) == ["start"]
    assert done.stderr.count("trial is REPAIRING; waiting for it.") == 1


@pytest.mark.slow
def test_a_queued_resource_is_requested_awaited_and_requested_again(cluster):
    """An earlier request came to nothing; of this one the slice is preempted."""
    cluster.plan(requests=["SUSPENDED", "ABSENT", "WAITING_FOR_RESOURCES"], states=["ABSENT"] * 3)
    cluster.plan(jobs={"0": ["preempt"], "1": [4]})
    done = launch(cluster, "--queued", "--spot", "--delete")
    assert done.returncode == 0, done.stderr
    changes = ["delete", "create", "delete", "create", "delete"]
    assert changing(cluster) == [f"queue {change}" for change in changes]
    (create, _) = (call for call in cluster.calls("gcloud") if call[3] == "create")
    assert {"--node-id=trial", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert "trial is WAITING_FOR_RESOURCES; waiting for it." in done.stderr


def test_a_lost_host_starts_the_run_again_and_a_fault_does_not(cluster):
    cluster.plan(node="READY v5litepod-16", jobs={"0": [4, 4], "1": [139, 1]})
    assert launch(cluster).returncode == 1, "the host that failed of itself is the reason"
    assert len(cluster.calls("jexit")) == 4
    cluster.plan(jobs={"0": [4, 4]})
    done = launch(cluster, "--restarts=1")
    assert done.returncode == 42
    assert len(cluster.calls("jexit")) == 8
    assert "raise --restarts to go on" in done.stderr


@pytest.mark.slow
def test_connections_that_fail_or_break_do_not_end_the_run(cluster):
    """And what an earlier run has left behind is not this one's end."""
    cluster.plan(node="READY v5litepod-16")
    assert launch(cluster).returncode == 0
    cluster.plan(jobs={"0": ["wait"], "1": ["wait"]}, unreachable=1, broken=1)
    process = cluster.start("tpu_vm.sh", *options(cluster), *JOB)
    lines = []
    while not any(ALREADY in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    assert any("the connection to trial broke" in line for line in lines)
    stopped = cluster.run("tpu_vm.sh", "stop", "--name=trial", "--zone=us-west4-a")
    assert stopped.returncode == 0, stopped.stderr
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, "a run that was stopped is not started again"
    assert "a run on host 0" in output
    assert len(cluster.calls("jexit")) == 4
    for host in "01":
        assert (cluster.directory / "hosts" / host / "signals").read_text() == "SIGTERM"


def test_neither_another_job_nor_an_interrupt_here_disturbs_a_run(cluster):
    cluster.plan(node="READY v5litepod-16", jobs={"0": ["wait"], "1": ["wait"]})
    process = cluster.start("tpu_vm.sh", *options(cluster), *JOB)
    cluster.waits_for("waiting")
    other = launch(cluster, job=["--", "--config=configs/sft.py", "--config.mesh.fsdp=16"])
    assert other.returncode == 1
    assert "is running another job (--config=configs/rl.py:qwen3-4b" in other.stderr
    assert other.stderr.splitlines()[-1] == (
        "jexit: trial runs another job; stop it first, or choose another --name."
    )
    assert len(cluster.calls("jexit")) == 2
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the script and what it waits for
    assert process.wait(timeout=60) == 130
    stopped = cluster.run("tpu_vm.sh", "stop", "--name=trial", "--zone=us-west4-a")
    assert "no run is going" not in stopped.stderr, "the interrupt should have left it alone"
    _, errors = process.communicate(timeout=60)
    assert "the run goes on; the same command follows it again" in errors


def test_what_lacks_capacity_is_tried_again_and_other_refusals_are_final(cluster):
    no_capacity = "There is no more capacity in the zone"
    cluster.plan(create_errors=[no_capacity, no_capacity, "Permission denied"])
    done = launch(cluster)
    assert done.returncode == 1 and changing(cluster) == ["create"] * 3
    assert done.stderr.splitlines()[-2:] == [
        "ERROR: Permission denied",
        "jexit: gcloud could not create trial for the reason above; put that right and try again.",
    ]


def test_a_state_that_cannot_be_read_or_does_not_pass_ends_the_launch(cluster):
    for state, sentence in (
        ("DENIED", "gcloud could not tell the state of trial: ERROR: (gcloud) PERMISSION_DENIED"),
        ("CREATING x", "trial was not ready within 0 s (it is CREATING); try again, another"),
    ):
        cluster.plan(node=state)
        done = launch(cluster, "--timeout=0")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"jexit: {sentence}")
    assert changing(cluster) == []


def test_results_come_over_ssh_where_there_is_no_bucket(cluster):
    run = cluster.directory / "shared" / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    job = [*JOB, f"--workdir={run}"]
    done = launch(cluster, "--delete", shared="10.0.0.2:/vol", job=job)
    assert done.returncode == 0, done.stderr
    mounted = cluster.calls("mount")[0]
    assert mounted[:-1] == ["-t", "nfs", "-o", "hard,lookupcache=none", "10.0.0.2:/vol"]
    fetched = cluster.directory / "results" / "runs" / "mine"
    assert [path.name for path in fetched.iterdir()] == ["metrics.jsonl"]
    assert changing(cluster) == ["create", "delete"]


def test_fetch_and_delete_alone(cluster):
    assert cluster.run("tpu_vm.sh", "fetch", *options(cluster), *JOB).returncode == 0
    assert cluster.run("tpu_vm.sh", "delete", "--name=trial", "--zone=z").returncode == 0
    assert [call[:4] for call in cluster.calls("gcloud")][1:] == [
        ["compute", "tpus", "tpu-vm", "delete"]
    ]


@pytest.mark.parametrize("queued", [[], pytest.param(["--queued"], marks=pytest.mark.slow)])
def test_a_dry_run_prints_what_a_run_does_and_runs_nothing(cluster, queued):
    before = sorted(cluster.directory.rglob("*"))
    printed = launch(cluster, "--dry-run", *queued)
    assert (printed.returncode, printed.stderr) == (0, "")
    for action in ("stop", "fetch", "delete"):
        done = cluster.run("tpu_vm.sh", action, *options(cluster, "--dry-run"), *JOB)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1].startswith("gcloud ")
    assert cluster.records() == []
    assert set(cluster.directory.rglob("*")) - set(before) == {cluster.directory / "home"}
    # A shell takes the lines back, and they do what the run does.
    cluster.plan(node="READY v5litepod-16")
    pasted = subprocess.run(
        ["bash", "-c", printed.stdout],
        cwd=cluster.directory,
        env=cluster.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert pasted.returncode == 0, pasted.stderr
    assert "jexit-status: 0" in pasted.stdout
    by_hand = cluster.calls("gcloud")
    (cluster.directory / "calls.jsonl").unlink()
    cluster.plan(node="ABSENT", request="ABSENT")
    assert launch(cluster, *queued).returncode == 0
    by_script = cluster.calls("gcloud")
    described = [call for call in by_script if call[3] == "describe"]
    assert described and all(call in by_hand for call in described)
    assert [c for c in by_hand if c[3] != "describe"] == [
        c for c in by_script if c[3] != "describe"
    ]


def test_a_wrong_command_line_is_one_sentence_and_creates_nothing(cluster):
    for wrong, job, said in [
        ("--zon=x", JOB, "unknown option '--zon=x'; the options are --name, --zone,"),
        ("--project", JOB, "--project has no value; write --project=VALUE."),
        ("--zone=", JOB, "--zone has no value; write --zone=VALUE."),
        ("--type=v9-8", JOB, "--type is 'v9-8'; give v5litepod-N or v6e-N"),
        ("--type=v6e-7", JOB, "--type is 'v6e-7'; give"),
        (
            "--type=v6e-8",
            JOB,
            "the mesh is data 1 × fsdp 16 × tensor 1 = 16 devices and v6e-8 has 8; make the "
            "product 8",
        ),
        ("--name=Trial", JOB, "--name is 'Trial'; use up to 40 lower-case letters"),
        ("--shared=/home/me", JOB, "--shared is '/home/me'; it is gs://BUCKET[/PATH] or"),
        ("--mount=here", JOB, "--mount is 'here'; it is an absolute path"),
        ("--restarts=08", JOB, "--restarts is '08'; it is a whole number."),
        ("--env=7=8", JOB, "--env is '7=8'; it sets a variable"),
        ("extra", JOB, "unknown option 'extra'"),
        ("--name zone=x", JOB, "unknown option '--name zone=x'"),
        ("--spot", [], "there is no config for jexit; end the command with -- --config="),
        (
            "--spot",
            ["--", "--config=configs/nothing.py"],
            "the config 'configs/nothing.py' is not in the checkout",
        ),
        ("--spot", [*JOB, "--workdir=/tmp/x"], "--workdir is '/tmp/x', outside of "),
        ("--spot", [*JOB, "--workdir=runs/../../x"], "--workdir is 'runs/../../x', outside of "),
        ("--spot", JOB[:2], "the mesh is data 1 × fsdp 1 × tensor 1 = 1 devices and v5litepod-16"),
    ]:
        done = launch(cluster, wrong, job=job)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"jexit: {said}")
    assert cluster.records() == []


def test_missing_options_and_tools_are_named(cluster):
    done = cluster.run("tpu_vm.sh", "--name=a", *JOB)
    assert (done.returncode, done.stderr) == (
        2,
        "jexit: --zone is missing; give --zone=VALUE (see --help).\n",
    )
    done = cluster.run("tpu_vm.sh", "begin", "--name=a", *JOB)
    assert "there is no action 'begin'; choose one of run, stop, fetch, delete" in done.stderr
    (cluster.bin / "gcloud").unlink()
    done = launch(cluster)
    assert done.returncode == 2
    assert "gcloud is not on the PATH; install it, or see with --dry-run" in done.stderr
    assert launch(cluster, "--dry-run").returncode == 0
    done = cluster.run("tpu_vm.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Runs a job on a Cloud TPU slice")
    assert "--dry-run" in done.stdout and "shellcheck" not in done.stdout


def test_types_have_their_images_and_numbers_of_chips(cluster):
    for type, flag, image, mesh in [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite", 16),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e", 8),
        ("v5p-16", "v5p-16", "v2-alpha-tpuv5", 8),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base", 16),
    ]:
        job = ["--", f"--config={ROOT}/configs/sft.py", f"--config.mesh.fsdp={mesh}"]
        done = launch(cluster, "--dry-run", type=type, job=job)
        assert f"--accelerator-type={flag} --version={image}\n" in done.stdout
