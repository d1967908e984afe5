"""Files of runs for tests of the report: every part that `eval.json` may have, and nasty texts.

The figures are made up, by a seed: what is tested is that the page says what the files say.
"""

import json
import math
import pathlib
import random

from jexit.config import config_dict
from jexit.io.metrics import MetricsWriter, SamplesWriter
from jexit.results import VERSION

LAYERS, EXITS = 8, [1, 2, 3, 4, 6]
CLASSES = ("digit", "operator", "word", "other", "marker", "answer", "end")
DEPTHS = [*EXITS, LAYERS]
NASTY = "sum <script>alert('1')</script> & \"3 < 4\"\n\x00\x1b[0m 😀 \ud83d\ufffe <b>é</b>"
TOKENS = ["<b>", " &", "4", "\n\n", "\t", " ", "", "😀", "\ufffd", '"', "'", "\x00", "#### ", "12"]
POLICIES = {  # name → accuracy, share of layers, what it is a control of
    "full": (0.98, 1.0, None),
    "sample": (0.95, 0.49, None),
    "threshold:0.3": (0.88, 0.41, None),
    "threshold:0.5": (0.96, 0.55, None),
    "fixed:matched": (0.41, 0.49, "sample"),
    "shuffled": (0.33, 0.49, "sample"),
}


def write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def around(value: float, low: float, high: float) -> list[float]:
    return [max(value - low, 0.0), min(value + high, 1.0)]


def policy_figures(policy: str, draw: random.Random) -> dict:
    """What `runs` holds for one policy."""
    accuracy, fraction, control_of = POLICIES[policy]
    accuracy = round(accuracy - 0.02 * draw.random(), 4)
    counts = {str(depth): draw.randrange(50, 900) for depth in DEPTHS}
    if policy == "full":
        counts = {str(LAYERS): 3000}
    layers = 12.5 * fraction * LAYERS
    return {
        "policy": policy,
        "accuracy": accuracy,
        "accuracy_ci95": around(accuracy, 0.05, 0.03),
        "depth_mean": fraction * LAYERS,
        "depth_fraction": fraction,
        "depth_fraction_ci95": around(fraction, 0.01, 0.01),
        "layers_per_problem": layers,
        "layers_per_problem_ci95": [layers - 2, layers + 2],
        "depth_histogram": counts,
        "depth_by_class": {
            name: {"tokens": 500 + place, "depth_mean": 1.0 + 6.5 * draw.random()}
            for place, name in enumerate(CLASSES)
        },
        "problems": 256,
        "tokens": sum(counts.values()),
        "completion_length": 12.5,
        "truncated": 0.01,
        "verdicts": {"strict": 240, "lenient": 3, "wrong": 12, "none": 1},
        "tokens_per_second": 4321.0,
        "text": {"step_size": 2.5},
        "control_of": control_of,
    }


def evaluation(seed: int = 0) -> dict:
    """An `eval.json` with every part."""
    draw = random.Random(seed)
    names = (
        *("early_answering", "no_chain", "filler", "corrupted_step", "hint"),
        *("necessity", "substantivity", "paraphrasability"),
    )
    granularities = {"at_once": 0.35, "5": 0.9, "4": 0.95, "3": 0.98, "2": 1.0}
    return {
        "version": VERSION,
        "complete": True,
        "task": {"name": "sums", "steps": "free"},
        "split": "test",
        "model": {"path": "runs/rl-tiny", "layers": LAYERS, "exits": EXITS},
        "runs": [policy_figures(policy, draw) for policy in POLICIES],
        "controls": [
            {
                "policy": "sample",
                "control": control,
                "accuracy_difference": gap,
                "accuracy_difference_ci95": [gap - 0.06, gap + 0.06],
                "depth_fraction_difference": 0.001,
                "depth_fraction_difference_ci95": [-0.01, 0.012],
                "problems": 256,
            }
            for control, gap in (("shuffled", 0.62), ("fixed:matched", 0.54))
        ],
        "hazards": [
            {
                "policy": "sample",
                "sharpness": 60.0,
                "ece": 0.0431,
                "kl_student_teacher_nats": 0.276,
                "exits": [hazards_at(layer) for layer in EXITS],
            }
        ],
        "serial_depth": [
            {
                "policy": "sample",
                "length": 80,
                "by_depth": {str(layer): 30 + 136 * layer for layer in (*EXITS, LAYERS)},
                "full": 30 + 136 * LAYERS,
                "mean": 431.7,
            }
        ],
        "planning": [
            {
                "policy": policy,
                "layer": layer,
                "ahead": ahead,
                "accuracy": 0.41,
                "accuracy_embedding": 0.32,
                "gain_ci95": [0.05, 0.13],
                "passes": 900,
            }
            for policy in ("sample", "full")
            for layer in EXITS
            for ahead in (1, 2)
        ],
        "faithfulness": [
            {
                "policy": policy,
                "problems": 128,
                "accuracy": 0.97,
                "depth_fraction": fraction,
                "completion_length": 14.0,
                "measures": [measure(name, fraction, draw.random()) for name in names],
            }
            for policy, fraction in (("full", 1.0), ("sample", 0.49))
        ],
        "faithfulness_paired": [
            {
                "measure": name,
                "policy": "sample",
                "against": "full",
                "value": 0.75,
                "against_value": 0.5,
                "difference": 0.25,
                "difference_ci95": [-0.125, 0.625],
                "problems": 110,
            }
            for name in ("accuracy", *names)
        ],
        "capacity": [
            capacity(policy, granularity, accuracy - drop, 0.25 if granularity == "5" else 0.98)
            for policy, drop in (("full", 0.0), ("sample", 0.05), ("shuffled", 0.3))
            for granularity, accuracy in granularities.items()
        ],
        "begun_steps": [
            capacity(policy, granularity, accuracy, 0.375)
            for policy, accuracy in (("full", 1.0), ("sample", 0.625))
            for granularity in ("2", "3")
        ],
    }


def hazards_at(layer: int) -> dict:
    """The calibration of an exit's hazards."""
    return {
        "exit": layer,
        "ece": 0.03 + 0.002 * layer,
        "positions": 2000 - 100 * layer,
        "hazard_mean": 0.1 * layer,
        "target_mean": 0.09 * layer,
        "bins": [
            {
                "low": low / 10,
                "high": (low + 1) / 10,
                "hazard_mean": low / 10 + 0.05,
                "target_mean": ((low + 0.5) / 10) ** (1 + 0.15 * layer),
                "positions": 100,
            }
            for low in range(9)
        ],
    }


def measure(name: str, fraction: float, value: float) -> dict:
    curve = [
        {
            "kept": kept / 5,
            "same_answer": 0.8 * (kept / 5) ** 2,
            "of_whole": (kept / 5) ** 2,
            "right": 0.97 * (kept / 5) ** 2.2,
        }
        for kept in range(6)
    ]
    return {
        "name": name,
        "value": value,
        "ci95": [0.1, 0.9],
        "problems": 120,
        "depth_fraction": fraction,
        "completion_length": 9.0,
        "detail": {"with_chain": 0.97, "answered": 0.31},
        "curve": curve if name == "early_answering" else None,
    }


def capacity(policy: str, granularity: str, accuracy: float, obeyed: float) -> dict:
    return {
        "policy": policy,
        "granularity": granularity,
        "accuracy": accuracy,
        "accuracy_ci95": around(accuracy, 0.06, 0.04),
        "obeyed": obeyed,
        "depth_fraction": 0.5,
        "completion_length": 12.0,
        "problems": 256,
    }


def completions(seed: int = 0, *, hazards: bool = True, prompts: int = 3) -> list[dict]:
    """A `completions.json`: every policy on every prompt, the first prompt a nasty one."""
    draw = random.Random(seed)
    records = []
    for policy in ("full", "sample", "threshold:0.5"):
        for number in range(prompts):
            tokens = TOKENS * 3 if number == 0 else list(f"{number}+7={number + 7}#### 12")
            drawn = [LAYERS if policy == "full" else draw.choice(DEPTHS) for _ in tokens[1:]]
            depths = [LAYERS, *drawn]
            record = {
                "policy": policy,
                "prompt": NASTY if number == 0 else f"sum {number}7",
                "completion": "".join(tokens),
                "tokens": tokens,
                "depths": depths,
                "verdict": draw.choice(("strict", "lenient", "wrong", "none")),
                "answer": "12",
            }
            if hazards:  # but of the first token, whose pass is the prompt's last
                reached = [[layer <= d for layer in EXITS] for d in (0, *depths[1:])]
                record["hazards"] = [
                    [round(draw.random(), 3) if there else None for there in row] for row in reached
                ]
            records.append(record)
    return records


def write_evaluated(workdir: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """The directory of an evaluation."""
    config = config_dict("eval").to_dict()
    config["seed"] = seed
    config["model"]["path"] = "runs/rl-tiny"
    write_json(workdir / "config.json", config)
    write_json(workdir / "eval.json", evaluation(seed))
    write_json(workdir / "completions.json", completions(seed))
    return workdir


def write_trained(
    workdir: pathlib.Path, *, steps: int = 60, seed: int = 0, depth_coef: float = 2.0
) -> pathlib.Path:
    """The directory of a training run with curves, samples and figures of before and after."""
    draw = random.Random(seed)
    config = config_dict("rl").to_dict()
    config["rl"]["depth_coef"] = depth_coef
    write_json(workdir / "config.json", config)
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            done = 1 - math.exp(-step / 20)
            noise = 0.05 * draw.random()
            fraction = 0.8 - (0.3 + 0.02 * seed) * done + noise
            writer.write(
                step,
                {
                    "accuracy": min(0.7 + 0.28 * done + noise, 1.0),
                    "depth/fraction": fraction,
                    "depth/mean": LAYERS * fraction,
                    "depth/p10": 1.0,
                    "depth/p90": 6.0 + noise,
                    **{f"exit/{depth}": (1 + done * (depth < 5)) / 6 for depth in DEPTHS},
                    "reward/mean": -0.2 + done + noise,
                    "reward/verifier": 0.5 + 0.5 * done,
                    "kl/teacher": 0.1 * done + noise,
                    "loss": 0.3 - done * 0.2 + noise,
                    "loss/policy": 0.2 - done * 0.2 + noise,
                    "completion/length": 22 - 10 * done,
                    "completion/truncated": 0.02 * (1 - done),
                    "step_seconds": 60.0 if step == 1 else 1.5 + noise,
                    "lr/lora": 1e-3 * (1 - done),
                },
            )
    with SamplesWriter(workdir) as writer:
        for step in (1, steps):
            for record in completions(seed, hazards=False, prompts=2):
                writer.write(step, [{**record, "reward": 0.5}])
    before, after = (policy_figures("sample", draw) for _ in range(2))
    write_json(workdir / "before.json", before | {"accuracy": 0.7344, "depth_fraction": 0.8})
    write_json(workdir / "after.json", after)
    return workdir
