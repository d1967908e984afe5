"""Evaluation end to end on a small random model, and its parts against figures known otherwise."""

import dataclasses
import json
import re

import pytest

from jexit.config import EVAL_MEASURES, TINY_CALIBRATED_PATH
from jexit.data.loader import encode_problems
from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import load
from jexit.loops.decoder import Decoded, Decoder, ModelCompleter
from jexit.loops.measure import Measurer, rounds
from jexit.loops.policies import Examination
from jexit.loops.setup import load_task
from jexit.model.policies import Threshold
from jexit.results import Evaluation, checked
from jexit.rollout import EngineSize, generate
from jexit.steps.state import split_model
from jexit.tasks import Problem
from jexit.tasks.sums import prescribed_steps, reduce_by
from small_runs import make_config, run

POLICIES = ("full", "threshold:0.2", "shuffled:threshold:0.2", "fixed:matched:threshold:0.2")


@pytest.fixture(scope="module")
def workdir(model_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eval") / "run"
    run(
        "eval", model_dir, workdir, eval__policies=POLICIES, eval__measures=EVAL_MEASURES,
        eval__measured="threshold:0.2", eval__problems=12, exits__layers=(),
    )  # fmt: skip
    return workdir


@pytest.fixture(scope="module")
def written(workdir):
    return json.loads((workdir / "eval.json").read_text())


def test_controls_run_at_the_depth_of_what_they_control(written):
    runs = {entry["policy"]: entry for entry in written["runs"]}
    assert [entry["control_of"] for entry in written["runs"]] == [None, None, *[POLICIES[1]] * 2]
    ours, shuffled, fixed = (runs[name] for name in POLICIES[1:])
    assert len(ours["depth_histogram"]) > 2, "the threshold should stop tokens at several exits"
    assert shuffled["depth_fraction"] == pytest.approx(ours["depth_fraction"], abs=0.08)
    if shuffled["tokens"] == ours["tokens"]:  # as many passes: the very same depths
        assert shuffled["depth_histogram"] == ours["depth_histogram"]
    # Exits lie a layer apart here: one of twelve completions moves the mean by about 1 / 12.
    assert abs(fixed["depth_mean"] - ours["depth_mean"]) < 1 / 12
    assert len(set(map(int, fixed["depth_histogram"])) - {3}) <= 2
    pairs = [(pair["policy"], pair["control"]) for pair in written["controls"]]
    assert pairs == [(POLICIES[1], POLICIES[2]), (POLICIES[1], POLICIES[3])]
    for pair in written["controls"]:
        assert pair["accuracy_difference"] == pytest.approx(
            ours["accuracy"] - runs[pair["control"]]["accuracy"]
        )


def test_figures_of_a_policy_agree_with_each_other(written):
    for entry in written["runs"]:
        assert entry["depth_by_class"].get("end", {"tokens": 0})["tokens"] <= entry["problems"]
        classes = entry["depth_by_class"].values()
        assert sum(part["tokens"] for part in classes) == entry["tokens"] - entry["problems"]
        layers = sum(part["tokens"] * part["depth_mean"] for part in classes)
        assert layers + 3 * entry["problems"] == pytest.approx(
            entry["depth_mean"] * entry["tokens"]
        )
        low, high = entry["depth_fraction_ci95"]
        assert low <= entry["depth_fraction"] <= high
        spent = sum(int(depth) * count for depth, count in entry["depth_histogram"].items())
        assert entry["layers_per_problem"] == pytest.approx(spent / entry["problems"])
        low, high = entry["layers_per_problem_ci95"]
        assert low <= entry["layers_per_problem"] <= high
        if len(entry["depth_histogram"]) > 1:
            assert low < high


def test_every_measure_is_there_for_both_policies(written):
    assert [entry["policy"] for entry in written["faithfulness"]] == [POLICIES[1], "full"]
    granularities = [entry["granularity"] for entry in written["capacity"]]
    assert granularities[::2] == ["2", "3", "4", "5", "at_once"]
    assert {entry["policy"] for entry in written["capacity"]} == {POLICIES[1], "full"}
    (hazards,) = written["hazards"]
    assert hazards["policy"] == POLICIES[1]
    assert 0 <= hazards["ece"] <= 1


def test_the_policy_is_set_against_full_depth_on_the_same_problems(written):
    pairs = {pair["measure"]: pair for pair in written["faithfulness_paired"]}
    runs = {entry["policy"]: entry for entry in written["runs"]}
    accuracy = pairs.pop("accuracy")
    assert (accuracy["policy"], accuracy["against"]) == (POLICIES[1], "full")
    assert accuracy["value"] == pytest.approx(runs[POLICIES[1]]["accuracy"])
    assert accuracy["against_value"] == pytest.approx(runs["full"]["accuracy"])
    assert accuracy["problems"] == 12
    low, high = accuracy["difference_ci95"]
    assert low <= accuracy["difference"] <= high and high > low
    ours, theirs = (
        {measure["name"]: measure["problems"] for measure in entry["measures"]}
        for entry in written["faithfulness"]
    )
    for name, pair in pairs.items():
        assert 0 < pair["problems"] <= min(ours[name], theirs[name])


@dataclasses.dataclass(frozen=True)
class AddsInItsHead:
    """A decoder that is right where the prompt prescribes at most so many operands a step."""

    tokenizer: Tokenizer
    up_to: dict[str, int]  # by policy
    obedient: bool = True
    layers: int = 3
    max_new_tokens: int = 40

    def policy(self, name, rows, columns):
        return name

    def decode(self, prompts, policy, *, judge=None, what, written=None, **_):
        ids, verdicts = [], []
        if written is not None:
            return self.step(prompts, policy)
        for number, prompt in enumerate(prompts):
            text = self.tokenizer.decode(prompt)
            digits = text.split()[-1]
            prescribed = re.search(r"by (\d)", text)
            size = int(prescribed[1]) if prescribed else len(digits)
            answer = (sum(map(int, digits)) + (size > self.up_to[policy])) % 10
            chain = ""
            if prescribed and self.obedient:
                chain, _ = reduce_by(digits, prescribed_steps(len(digits), size))
            ids.append(self.tokenizer.encode(f"{chain}#### {answer}"))
            verdicts.append(judge(number, ids[-1], False))
        return Decoded(
            ids=ids, depths=[[3] * len(some) for some in ids], truncated=[False] * len(ids),
            verdicts=verdicts, tokens_per_second=1.0,
        )  # fmt: skip

    def step(self, prompts, policy):
        """The result of a step that was begun, off by one where it is too large for the head."""
        ids = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            assert "by" not in text and "at once" not in text
            digits, signs = re.search(r"(\d+)\D*?(\++)\Z", text).groups()
            size = len(signs) + 1
            result = (sum(map(int, digits[:size])) + (size > self.up_to[policy])) % 10
            ids.append(self.tokenizer.encode(f"{result}{digits[size:]}"))
        depths = [[1] + [3] * (len(some) - 1) for some in ids]
        return Decoded(
            ids=ids, depths=depths, truncated=[False] * len(ids), verdicts=[], tokens_per_second=1.0
        )


def capacity_of(up_to, task__steps="free", **settings):
    config = make_config(
        "eval", TINY_CALIBRATED_PATH, task__operands_min=6, task__operands_max=8,
        eval__measures=("capacity",), eval__measured="threshold:0.5", eval__problems=8,
        task__steps=task__steps,
    )  # fmt: skip
    tokenizer = Tokenizer.load(TINY_CALIBRATED_PATH)
    examination = Examination.of(load_task(config.task, "test"), tokenizer, config)
    decoder = AddsInItsHead(tokenizer, up_to, **settings)
    measurer = Measurer(config, decoder, examination, None, (1, 2), 512, {})
    seen = Silent()
    parts = measurer.run(0, seen)
    assert seen.done == rounds(examination.task, config.eval)
    return parts["capacity"], parts["begun_steps"]


def test_capacity_is_what_can_be_added_in_the_head():
    up_to = {"threshold:0.5": 3, "full": 4}
    capacity, begun = capacity_of(up_to)
    accuracy = {(entry["policy"], entry["granularity"]): entry["accuracy"] for entry in capacity}
    for policy, most in up_to.items():
        for size in (2, 3, 4, 5):
            assert accuracy[policy, str(size)] == float(size <= most), (policy, size)
        assert accuracy[policy, "at_once"] == 0.0
    steps = [entry["less_full_ci95"] for entry in capacity if entry["policy"] == "threshold:0.5"]
    assert all(low < 0 < high for low, high in (steps[0], steps[1], steps[3], steps[4]))
    assert steps[2][1] < 0  # steps of four: never under the policy, always at full depth
    assert all(entry["obeyed"] == 1.0 for entry in capacity)
    assert all(entry["accuracy_obeyed"] == entry["accuracy"] for entry in capacity)
    results = {(entry["policy"], entry["granularity"]): entry["accuracy"] for entry in begun}
    assert results == {
        (policy, str(size)): float(size <= most)
        for policy, most in up_to.items()
        for size in (2, 3, 4, 5)
    }
    assert all(entry["depth_fraction"] == pytest.approx(1 / 3) for entry in begun)
    assert begun[2]["less_full"] == -1 and begun[1]["less_full"] == begun[3]["less_full"] == 0


def test_steps_are_begun_after_prompts_that_ask_for_none():
    asked = [capacity_of({"threshold:0.5": 3, "full": 4}, task__steps=s)[1] for s in ("free", "2")]
    assert asked[0] == asked[1]


def test_a_model_that_takes_other_steps_than_asked_for_shows_no_capacity():
    capacity, begun = capacity_of({"threshold:0.5": 9, "full": 9}, obedient=False)
    assert all(entry["accuracy"] == entry["obeyed"] == 1.0 for entry in begun)  # it needs not obey
    for entry in capacity:
        assert entry["accuracy"] == 1.0
        assert entry["obeyed"] == float(entry["granularity"] == "at_once")
        assert entry["accuracy_obeyed"] == (1.0 if entry["obeyed"] else None)


class Silent:
    def update(self, done, **_):
        self.done = done


def test_what_the_policies_gave_outlives_a_measure_that_fails(
    model_dir, tmp_path, monkeypatch, written
):
    assert written["complete"] is True

    def fails(self, done, progress):
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(Measurer, "run", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        run("eval", model_dir, tmp_path / "run", eval__policies=POLICIES[:2], eval__measures=(),
            eval__problems=3)  # fmt: skip
    kept = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert kept["complete"] is False
    assert [entry["policy"] for entry in kept["runs"]] == list(POLICIES[:2])
    assert (tmp_path / "run" / "completions.json").exists()
    read = checked(Evaluation, kept, "eval")
    assert read.faithfulness is None


def test_a_tokenizer_without_filler_is_refused_before_anything_runs(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("jexit.loops.decoder.FILLERS", ("sum ",))
    with pytest.raises(ValueError, match=r"leave filler out of config\.eval\.measures"):
        run("eval", model_dir, tmp_path / "run", eval__measures=("filler",))
    assert not (tmp_path / "run").exists()


def test_completions_are_kept_with_depth_and_hazards(workdir):
    rows = json.loads((workdir / "completions.json").read_text())
    assert {row["policy"] for row in rows} == set(POLICIES)
    for row in rows:
        if row["policy"].startswith("fixed:matched"):
            assert len(set(row["depths"][1:])) <= 1  # a completion has one exit
        assert len(row["tokens"]) == len(row["depths"]) == len(row["hazards"])
        assert row["hazards"][0] == [None, None]
        for depth, hazards in list(zip(row["depths"], row["hazards"], strict=True))[1:]:
            assert [hazard is not None for hazard in hazards] == [depth >= 1, depth >= 2]
            if row["policy"] == POLICIES[1]:
                left = [hazard is not None and hazard > 0.2 for hazard in hazards]
                assert depth == next((e + 1 for e in (0, 1) if left[e]), 3)


def test_hazards_are_those_of_the_distribution_that_was_sampled(model_dir, tmp_path):
    """With a floor of 0.6 and a temperature of 100 each hazard is near 0.6 + 0.4 · ½."""
    run(
        "eval", model_dir, tmp_path / "run", eval__policies=("sample",), eval__problems=4,
        eval__measures=("hazards",), rl__min_hazard=0.6, rl__hazard_temperature=100.0,
    )  # fmt: skip
    rows = json.loads((tmp_path / "run" / "completions.json").read_text())
    recorded = [h for row in rows for token in row["hazards"] for h in token if h is not None]
    assert recorded and all(0.75 < hazard < 0.85 for hazard in recorded)
    (measured,) = [
        part
        for part in json.loads((tmp_path / "run" / "eval.json").read_text())["hazards"]
        if part["policy"] == "sample"
    ]
    for exit_ in measured["exits"]:
        assert all(0.75 < place["hazard_mean"] < 0.85 for place in exit_["bins"])


def test_a_split_with_fewer_problems_than_asked_for_is_measured_whole_and_said(caplog):
    from jexit.loops.policies import held_out

    config = make_config(
        "eval", TINY_CALIBRATED_PATH, task__name="sums", task__operands_min=2,
        task__operands_max=2, eval__problems=256, eval__split="test",
    )  # fmt: skip
    task = load_task(config.task, "test")
    _, tokenizer = load(TINY_CALIBRATED_PATH)
    problems, _ = held_out(task, tokenizer, config, 256)
    assert 3 <= len(problems) < 30 and len({problem.prompt for problem in problems}) == len(
        problems
    )
    said = f"'sums' has {len(problems)} problems in its test split with these settings, and"
    assert said in caplog.text and "eval.problems asks for 256" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eval__policies": ("full", "shuffled")}, "'shuffled' is a control for 'sample'"),
        ({"eval__policies": ("shuffled:full", "full")}, "put that before it"),
        ({"eval__policies": ("fixed:matched:deep",)}, "policy 'deep' is not known"),
        ({"eval__measures": ("chain",)}, "measures names 'chain'; choose among exits, hazards"),
        ({"eval__measured": "shuffled"}, "policy 'shuffled' is not known"),
    ],
)
def test_refuses(model_dir, settings, says):
    with pytest.raises(ValueError, match=says):
        make_config("eval", model_dir, **settings)


@pytest.fixture(scope="module")
def completer():
    """The shipped model, whose text gives its tokens again."""
    model, tokenizer = load(TINY_CALIBRATED_PATH)
    split = split_model(model, full=False)
    decoder = Decoder(
        parts=split.decodable(split.trainable), layers=8, tokenizer=tokenizer, size=EngineSize(),
        temperature=0.0, max_new_tokens=12, seed=0,
    )  # fmt: skip
    return ModelCompleter(decoder, "threshold:0.3", model.arch.max_positions), model


def test_a_completer_goes_on_as_decoding_would_have(completer):
    """From a completion's own first tokens on come its last ones, at the same depths."""
    completer, model = completer
    tokenizer = completer.decoder.tokenizer
    prompts = ["sum 3729518", "sum by 3 48151"]
    whole = generate(model, tokenizer, prompts, policy=Threshold(0.3), max_new_tokens=12)
    begun = [tokenizer.decode(ids[:5]) for ids in whole.tokens]
    for text, ids in zip(begun, whole.tokens, strict=True):
        assert tokenizer.encode(text) == ids[:5]
    problems = [Problem(prompt=prompt, answer="") for prompt in prompts]
    replies = completer.complete(problems, begun, answer_only=False)
    for reply, ids, depths, text in zip(replies, whole.tokens, whole.depths, begun, strict=True):
        assert (text + reply.text).startswith(tokenizer.decode(ids))
        assert reply.depths[: len(ids) - 5] == depths[5:]


@pytest.mark.parametrize("text", ["", "+34+7####7", "Tom has 3 apples.\n3+4=7\n"])
def test_filler_has_as_many_tokens(completer, text):
    completer, _ = completer
    encode = completer.decoder.tokenizer.encode
    made = completer.filler(text)
    assert len(encode(made)) == len(encode(text))
    assert not any(character.isalnum() for character in made)


def test_replies_are_as_long_as_the_positions_that_are_left_allow(completer):
    """Prompts that differ in their room: whole, cut off, and none."""
    completer, _ = completer
    tokenizer = completer.decoder.tokenizer
    problem = Problem(prompt="sum 3729518", answer="5")
    (asked,) = encode_problems(tokenizer, [problem])
    talkative = dataclasses.replace(completer.decoder, max_new_tokens=40)
    begun = ["", "3" * 200, "3" * 60]
    assert [len(ids) for ids in tokenizer.encode_batch(begun)] == [0, 200, 60]
    tight = ModelCompleter(talkative, "full", len(asked) + 60 + 20)
    whole, none, cut = tight.complete([problem] * 3, begun, answer_only=False)
    assert none is None
    assert 0 < len(cut.depths) <= 20
    roomy = ModelCompleter(talkative, "full", completer.positions)
    there = roomy.complete([problem] * 2, [begun[0], begun[2]], answer_only=False)
    assert whole == there[0]
    assert len(there[1].depths) > 20, "without a limit it should write on"
    assert cut.depths == there[1].depths[: len(cut.depths)]
    assert there[1].text.startswith(cut.text)
    answers = tight.complete([problem] * 3, begun, answer_only=True)
    assert [answer is None for answer in answers] == [False, True, False]


class Thinks:
    """A tokenizer whose prompts end in `<think>`."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def completion_text(self, ids):
        return "<think>\n" + self._tokenizer.decode(ids)


def test_what_the_prompt_has_opened_is_not_written_again(completer):
    completer, _ = completer
    thinks = dataclasses.replace(completer.decoder, tokenizer=Thinks(completer.decoder.tokenizer))
    thinking = ModelCompleter(thinks, completer.policy, completer.positions)
    assert (thinking.opening, completer.opening) == ("<think>\n", "")
    problems = [Problem(prompt="sum 372", answer="2")]
    wanted = completer.complete(problems, ["+02"], answer_only=False)
    assert thinking.complete(problems, ["<think>\n+02"], answer_only=False) == wanted
