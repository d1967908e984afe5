"""Inspect's evaluations with the provider `jexit`, and with Inspect's own client of the server."""

import asyncio

import numpy as np
import pytest

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")

import jexit  # noqa: E402
from jexit.serve import inspect_provider, inspect_registry  # noqa: E402
from jexit.serve.protocol import Refused  # noqa: E402
from jexit.tasks import Attempt, make_task  # noqa: E402
from tolerances import LOGPROBS  # noqa: E402

MODEL = "jexit/assets/tiny-calibrated"
COUNT = 20


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")


@pytest.fixture(scope="module")
def wanted(loaded):
    """What `generate` makes of the same problems under threshold:0.5, with the task's verdicts."""
    task = make_task("sums")
    problems = [task.problem("test", index) for index in range(COUNT)]
    made = jexit.generate(
        *loaded, [problem.prompt for problem in problems], policy=jexit.Threshold(0.5),
        max_new_tokens=48,
    )  # fmt: skip
    verdicts = task.judge(problems, [Attempt(text=text) for text in made.texts])
    return made, [verdict.correct for verdict in verdicts]


def evaluated(model, **settings):
    task = inspect_registry.problems("sums", problems=COUNT)
    (log,) = inspect_ai.eval(
        task, model=model, temperature=0.0, max_tokens=48, log_samples=True, **settings
    )
    assert log.status == "success", log.error
    return log


@pytest.mark.slow
def test_the_provider_decodes_and_the_task_measures(wanted):
    made, correct = wanted
    log = evaluated(
        f"jexit/{MODEL}",
        model_args={
            "policy": "threshold:0.5",
            "max_prompt_tokens": 16,
            "max_new_tokens": 48,
            "rows": 4,
        },
        logprobs=True,
    )
    samples = sorted(log.samples, key=lambda sample: sample.id)
    assert [sample.output.completion for sample in samples] == made.texts
    found = [[e.logprob for e in s.output.choices[0].logprobs.content] for s in samples]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(made.logprobs), 0, LOGPROBS)
    assert [sample.output.metadata["depths"] for sample in samples] == made.depths
    assert [sample.scores["verdicts"].value == "C" for sample in samples] == correct
    metrics = {name: each.value for name, each in log.results.scores[0].metrics.items()}
    layers, tokens = sum(map(sum, made.depths)), sum(map(len, made.depths))
    assert metrics["accuracy"] == pytest.approx(sum(correct) / COUNT)
    assert metrics["depth_fraction"] == pytest.approx(layers / (8 * tokens))
    assert metrics["layers_per_problem"] == pytest.approx(layers / COUNT)


def test_a_thought_that_was_cut_off_is_no_answer():
    """If the prompt opens the thought, the completion alone would look like an answer."""
    task = make_task("word_problems")
    text, answer = "so\n#### 7\nwait", task.problem("test", 0).answer
    for opening, kind in (("", "wrong" if answer != "7" else "strict"), ("<think>\n", "none")):
        output = inspect_ai.model.ModelOutput.from_content("jexit/x", text)
        output.metadata = {"opening": opening}
        state = inspect_ai.solver.TaskState(
            model="jexit/x", sample_id=1, epoch=1, input="", messages=[], output=output
        )
        score = inspect_registry.verdicts(task, "test")
        found = asyncio.run(score(state, inspect_ai.scorer.Target(answer)))
        assert found.metadata["kind"] == kind


def test_only_text_reaches_the_model(served, monkeypatch):
    """The provider refuses images and the like; it leaves out the reasoning of earlier answers."""
    from inspect_ai import model as inspect

    monkeypatch.setattr(inspect_provider, "open_pool", lambda *_, **__: served.opened)
    provider = inspect_provider.JexitAPI("tiny")

    def answer(*messages):
        config = inspect.GenerateConfig(temperature=0, max_tokens=48)
        return asyncio.run(provider.generate([*messages], [], "auto", config)).completion

    text, image = inspect.ContentText(text="sum 37"), inspect.ContentImage(image="data:,x")
    reasoning = inspect.ContentReasoning(reasoning="hm")
    asked = inspect.ChatMessageUser(content="sum 12")
    for content, kind in (([text, image], "image"), ([text, reasoning], "reasoning")):
        rule = rf"messages\[1\]\.content\[1\]\.type is '{kind}', but jexit reads only text; leave"
        with pytest.raises(Refused, match=rule) as caught:
            answer(asked, inspect.ChatMessageUser(content=content))
        assert caught.value.status == 400
    earlier = [
        inspect.ChatMessageAssistant(content=content)
        for content in ("+3####3", [reasoning, inspect.ContentText(text="+3####3")])
    ]
    last = inspect.ChatMessageUser(content=[text])
    plain, reasoned = (answer(asked, each, last) for each in earlier)
    assert plain == reasoned != ""


def test_inspects_openai_client_against_the_server(served, wanted, monkeypatch):
    made, correct = wanted
    monkeypatch.setenv("SERVED_API_KEY", served.api_key)
    monkeypatch.setenv("SERVED_BASE_URL", f"{served.url}/v1")
    log = evaluated("openai-api/served/tiny", extra_body={"policy": "threshold:0.5"})
    samples = sorted(log.samples, key=lambda sample: sample.id)
    assert [sample.output.completion for sample in samples] == made.texts
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(correct) / COUNT)
