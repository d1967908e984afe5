"""launch/slurm.sh against stand-ins: the batch job, its signals, and queueing again."""

import shutil

import pytest

from stand_ins import JOB_ID, ROOT, StandIns

JOB = ["--", "--config=configs/sft.py:qwen3-4b", "--config.mesh.data=2", "--config.mesh.fsdp=8"]


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "shared").mkdir()
    return StandIns(tmp_path)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, whose environment the job makes."""
    directory = tmp_path / "checkout"
    for part in ("launch", "configs"):
        shutil.copytree(ROOT / part, directory / part)
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def launch(cluster, *more, checkout=ROOT, nodes=2, job=JOB):
    return cluster.run(
        checkout / "launch" / "slurm.sh",
        *("--name=trial", f"--nodes={nodes}", "--gpus=8", f"--shared={cluster.directory}/shared"),
        *(*more, *job),
    )


def test_every_node_runs_one_process_that_knows_the_others(cluster, checkout):
    done = launch(
        cluster,
        *("--time=24:00:00", "--partition=gpu", "--account=us", "--env=TEST_WORD=two words"),
        *("--option=--exclusive", "--wait"),
        checkout=checkout,
    )
    assert done.returncode == 0, done.stderr
    (call,) = cluster.calls("sbatch")
    shared = cluster.directory / "shared"
    assert call[:-9] == [
        *("--parsable", "--job-name=trial", "--nodes=2", "--ntasks-per-node=1"),
        *("--gpus-per-node=8", "--time=24:00:00", "--partition=gpu", "--account=us"),
        *("--signal=B:USR1@180", "--requeue", "--open-mode=append"),
        *(f"--output={shared}/trial-%j.log", "--wait", "--exclusive"),
    ]
    runs = [record for record in cluster.records() if record["name"] == "jexit"]
    assert sorted(record["host"] for record in runs) == ["0", "1"]
    for record in runs:
        assert record["args"] == [
            *JOB[1:],
            *(f"--coordinator=node1:{20000 + JOB_ID}", "--processes=2"),
            f"--process={record['host']}",
        ]
        assert record["cwd"] == str(shared)
        assert record["env"] == {"TEST_WORD": "two words"}
    installs = [c for c in cluster.calls("python") if c[:3] == ["-m", "pip", "install"]]
    assert len(installs) == 1, "the first node installs for all"


def test_one_node_needs_no_coordinator(cluster, checkout):
    cluster.plan(hosts=1)
    job = [*JOB[:2], "--config.mesh.fsdp=8"]
    done = launch(cluster, checkout=checkout, nodes=1, job=job)
    assert done.returncode == 0, done.stderr
    assert cluster.calls("jexit") == [job[1:]]


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 0), ("SIGTERM", 42)])
def test_a_signal_has_the_run_save_and_the_time_limits_queues_it_again(
    name, code, cluster, checkout
):
    """A job that is cancelled stays away."""
    cluster.plan(jobs={"0": ["wait"], "1": ["wait"]}, slurm_signal=name)
    done = launch(cluster, checkout=checkout)
    assert done.returncode == code, done.stderr
    again = int(name == "SIGUSR1")
    assert cluster.calls("scontrol").count(["requeue", str(JOB_ID)]) == again
    assert len(cluster.calls("jexit")) == 2 + 2 * again
    for host in "01":
        received = (cluster.directory / "hosts" / host / "signals").read_text()
        assert received == "SIGTERM"


def test_a_lost_node_queues_again_up_to_a_limit_and_a_fault_does_not(cluster, checkout):
    cluster.plan(jobs={"0": [4, 4], "1": [137, 1]})
    done = launch(cluster, checkout=checkout)
    assert done.returncode == 1, "the node that failed of itself is the reason"
    assert cluster.calls("scontrol").count(["requeue", str(JOB_ID)]) == 1
    assert len(cluster.calls("jexit")) == 4
    cluster.plan(jobs={"0": [4] * 9})
    done = launch(cluster, "--restarts=1", checkout=checkout)
    assert done.returncode == 42
    assert len(cluster.calls("jexit")) == 8
    assert "the job has been queued again 1 times; submit it again" in done.stderr


def test_a_dry_run_prints_everything_and_runs_nothing(cluster):
    done = launch(cluster, "--dry-run", "--option=--comment=two words")
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.records() == []
    lines = done.stdout.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 1 and commands[0].startswith("sbatch --parsable --job-name=trial")
    assert "'--comment=two words'" in commands[0]
    comments = [line[2:].split()[0] for line in lines if line.startswith("#")]
    assert [c for c in comments if c in ("scontrol", "bash", "srun")] == [
        *("bash", "scontrol", "srun", "scontrol")
    ]
    assert list((cluster.directory / "shared").iterdir()) == []


def test_a_wrong_command_line_is_one_sentence_and_submits_nothing(cluster):
    for wrong, job, said in [
        ("--gpus=0", JOB, "--nodes is 2 and --gpus is 0; both are at least 1."),
        (
            "--nodes=4",
            JOB,
            "the mesh is data 2 × fsdp 8 × tensor 1 = 16 devices and 4 × 8 GPUs has 32; make",
        ),
        ("--shared=runs", JOB, "--shared is 'runs'; it is an absolute path"),
        ("--shared=/not/there", JOB, "there is no directory /not/there; make it, on a file system"),
        ("--zone=x", JOB, "unknown option '--zone=x'; the options are --name, --nodes, --gpus,"),
        ("--wait dry-run", JOB, "unknown option '--wait dry-run'; the options are --name,"),
        ("--wait", [*JOB, "--workdir=/tmp/runs"], "--workdir is '/tmp/runs', outside of"),
    ]:
        done = launch(cluster, wrong, job=job)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"jexit: {said}")
    assert cluster.records() == []
