"""The shipped models: loadable by others, and able to do what they are shipped for."""

import pathlib

import numpy as np
import pytest

import jexit
from jexit.tasks import make_task
from tolerances import LOGITS

ASSETS = pathlib.Path(jexit.__file__).parent / "assets"


@pytest.fixture(scope="module")
def theirs():
    """The shipped trunk in transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype="float32")


def tokens_of(tokenizer, count: int = 16) -> np.ndarray:
    """Right-padded prompts with their reference completions, and each one's length."""
    task = make_task("sums", steps="mixed")
    asked = (task.problem("test", index) for index in range(count))
    rows = [tokenizer.encode_prompt(p.prompt) + tokenizer.encode(p.completion) for p in asked]
    tokens_BT = np.full((count, max(map(len, rows))), tokenizer.pad_id, np.int32)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
    return tokens_BT, np.asarray([len(ids) for ids in rows], np.int32)


def largest_difference(model, theirs, tokens_BT, lengths_B) -> float:
    import torch

    ours_BTV = np.asarray(jexit.forward(model, tokens_BT, lengths_B).logits_BTV)
    with torch.no_grad():
        theirs_BTV = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    real_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    return float(np.abs(ours_BTV - theirs_BTV)[real_BT].max())


def test_the_shipped_trunk_has_the_logits_and_the_text_that_transformers_gives(theirs):
    import torch

    model, tokenizer = jexit.load(ASSETS / "tiny")
    tokens_BT, lengths_B = tokens_of(tokenizer)
    assert largest_difference(model, theirs, tokens_BT, lengths_B) < LOGITS
    prompt = "sum 3729518"
    ids = torch.tensor([tokenizer.encode_prompt(prompt)])
    expected = theirs.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    ours = jexit.generate(model, tokenizer, [prompt], max_new_tokens=48, temperature=0.0)
    assert ours.tokens[0] == expected.tolist()


def test_the_shipped_adapter_loads_in_peft_on_the_shipped_trunk():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    # peft changes the base in place, so it gets one of its own.
    base = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype="float32")
    theirs = peft.PeftModel.from_pretrained(base, ASSETS / "tiny-calibrated").eval()
    model, tokenizer = jexit.load(ASSETS / "tiny-calibrated")
    assert model.exit_layers == (1, 2, 3, 4, 6)
    assert largest_difference(model, theirs, *tokens_of(tokenizer)) < LOGITS


@pytest.mark.slow
def test_the_shipped_trunk_takes_steps_of_every_size_and_answers_stories():
    """Greedy, all layers. Right sums must be compatible with 98 %.

    Of stories a third of the places and half of the rest would be right by chance.
    """
    model, tokenizer = jexit.load(ASSETS / "tiny")
    story = make_task("tom", steps="fine")
    wanted = [(make_task("sums", steps=size), 64, 61) for size in "2345"]
    for task, count, least in (*wanted, (story, 96, 58)):
        asked = [task.problem("test", index) for index in range(count)]
        prompts = [problem.prompt for problem in asked]
        texts = jexit.generate(model, tokenizer, prompts, max_new_tokens=56, temperature=0.0).texts
        kinds = [task.verify(*pair).kind for pair in zip(asked, texts, strict=True)]
        assert kinds.count("strict") >= least, task
