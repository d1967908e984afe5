"""From rollouts to the batch of an update: every number stays with its completion."""

import numpy as np

from jexit.config import TINY_PATH
from jexit.data.loader import PromptBatch
from jexit.data.tokenizer import Tokenizer
from jexit.dist import host_rows
from jexit.loops.packing import PackedShapes
from jexit.loops.rl import Judged, Totals, rl_batch
from jexit.rollout import Rollouts
from jexit.tasks import Problem, Task, Verdict

PROMPTS = [[5, 6, 7], [8, 9]]
LENGTHS = [4, 1, 3, 2, 5, 4]  # three rollouts of each prompt
LAYERS, NEW = 3, 5


class Told(Task):
    """Rewards the problem's own number and the completion's first token; odd tokens are correct."""

    name = "told"

    def problem(self, split, index):
        raise NotImplementedError

    def verify(self, problem, completion):
        raise NotImplementedError

    def judge(self, problems, attempts):
        return [
            Verdict(
                kind="strict" if attempt.ids[0] % 2 else "wrong",
                reward=100.0 * int(problem.answer) + attempt.ids[0],
            )
            for problem, attempt in zip(problems, attempts, strict=True)
        ]


def rolled():
    """Six rollouts, all numbers of which say whose they are."""
    rows, column_T = len(LENGTHS), np.arange(NEW)
    there_BT = column_T < np.asarray(LENGTHS)[:, None]
    number_BT = np.arange(rows)[:, None] + 10.0 * column_T

    def kept(values, dtype=np.float32):
        return np.where(there_BT, values, 0).astype(dtype)

    return Rollouts(
        prompts=PROMPTS,
        prompt_B=np.repeat([0, 1], 3),
        host_rows=host_rows(rows),
        tokens_BT=kept(10 + np.arange(rows)[:, None] + column_T, np.int32),
        lengths_B=np.asarray(LENGTHS, np.int32),
        depths_BT=kept(1 + (np.arange(rows)[:, None] + column_T) % LAYERS, np.int32),
        logprobs_BT=kept(-1 - number_BT),
        depth_logprobs_BT=kept(-0.5 - number_BT) * (column_T > 0),
        hazard_logits_BTE=None,
        truncated_B=np.asarray([False, True, False, False, True, False]),
        shape=(4, 16),
        seconds=1.0,
        prompt_padding=0.0,
        idle=0.0,
    )


def test_rewards_and_numbers_of_a_rollout_stay_with_its_tokens():
    rollouts, tokenizer = rolled(), Tokenizer.load(TINY_PATH)
    problems = [Problem(prompt="one", answer="1"), Problem(prompt="two", answer="2")]
    prompts = PromptBatch(problems=problems, tokens=PROMPTS)
    own = Judged.of(Told(), tokenizer, prompts, rollouts)
    assert [problem.answer for problem in own.problems] == [*"111222"]
    totals = Totals.over_hosts(Told(), own, samples=3, skipped=2, rollout_flops=7.0)
    assert (totals.rows, totals.tokens, totals.skipped) == (6, sum(LENGTHS), 2)
    assert totals.correct == 3 and totals.accuracy == 0.5  # first tokens 10 to 15
    leaving = [rollouts.depths_BT[row, 1:n] for row, n in enumerate(LENGTHS)]
    assert totals.mean_depth(LAYERS) == np.concatenate(leaving).mean()
    batch = rl_batch(own, 0, PackedShapes(1, 1, 16, 32).fit(totals.lengths))
    reward_J = [100.0 * (1 + row // 3) + 10 + row for row in range(6)]
    np.testing.assert_array_equal(batch.verifier_J, reward_J)
    for found, wanted in (
        (batch.lengths_J, LENGTHS),
        (batch.truncated_J, rollouts.truncated_B),
        (batch.rows.by_completion(batch.rows.completion_tokens_BC, (6, NEW)), rollouts.tokens_BT),
        (batch.depth_JW, rollouts.depths_BT),
        (batch.logprobs_JW, rollouts.logprobs_BT),
        (batch.depth_logprobs_JW, rollouts.depth_logprobs_BT),
    ):
        np.testing.assert_array_equal(found, wanted)
    sample = own.sample(4, tokenizer)
    assert (sample["prompt"], sample["reward"], sample["verdict"]) == ("two", 214.0, "wrong")
    assert sample["depths"] == rollouts.depths_BT[4].tolist()
