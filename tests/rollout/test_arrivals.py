"""Requests that join and leave a running pool: each as if it were alone."""

import dataclasses
import types

import numpy as np
import pytest

from jexit.model.policies import Fixed, Full, Prescribed, Sample, Threshold
from jexit.rollout import Arrivals, EngineSize, Request, prefill, ticks
from teacher_forcing import assert_as_teacher_forced


def request(*lengths: int, **settings) -> Request:
    prompts = [np.random.default_rng(n).integers(0, 60, n).tolist() for n in lengths]
    common = {"eos_ids": (60,), "pad_id": 59, "max_new_tokens": 20}
    return Request(prompts=prompts, **common | settings)


REQUESTS = [
    request(3, policy=Sample(2.0, 0.1), temperature=0.9, key=5),
    request(11, 6, policy=Threshold(0.55), temperature=0.0, max_new_tokens=9, key=1),
    request(16, policy=Full(), temperature=0.0, key=2),
    request(1, policy=Fixed(2), top_p=0.8, max_new_tokens=1, key=2),
    request(14, policy=Fixed(2), top_p=0.8, key=7, first_prompt=4),
    request(9, policy=Sample(2.0, 0.1), temperature=0.9, max_new_tokens=12, key=8),
    request(*[7] * 10, 5, policy=Sample(2.0, 0.1), temperature=0.9, max_new_tokens=6, key=9),
    request(9, 10, 12, 13, 16, policy=Sample(2.0, 0.1), top_p=0.8, max_new_tokens=5, key=3),
]


@pytest.fixture
def pool(model) -> Arrivals:
    return Arrivals(
        model, eos_ids=(60,), pad_id=59, max_prompt_tokens=16, max_new_tokens=20,
        size=EngineSize(rows=3, tick_rows=2),
    )  # fmt: skip


def drained(pool: Arrivals, requests: list[Request], steps: int = 2) -> dict[int, tuple]:
    """Each ticket's (tokens, depths, log-probabilities, hazard logits); one joins in each turn."""
    whole, finished, coming = {}, {}, list(requests)
    while coming or not all(finished.values()):
        if coming:
            finished |= dict.fromkeys(pool.join(coming.pop(0)), False)
        for news in pool.turn(steps):
            assert not finished[news.ticket], "nothing comes after the end"
            finished[news.ticket] = news.finished
            parts = whole.setdefault(news.ticket, ([], [], [], []))
            added = news.tokens, news.depths, news.logprobs, news.hazard_logits
            for part, more in zip(parts, added, strict=True):
                part.extend(more)
    assert pool.turn() == []
    return dict(sorted(whole.items()))


def as_rollouts(request: Request, completions: list[tuple]) -> types.SimpleNamespace:
    """A request's completions as `Rollouts` have them."""
    tokens, depths, logprobs, hazard_logits = zip(*completions, strict=True)

    def padded(rows, fill):
        return np.asarray([[*row, *[fill] * (request.max_new_tokens - len(row))] for row in rows])

    return types.SimpleNamespace(
        tokens_BT=padded(tokens, request.pad_id),
        depths_BT=padded(depths, 0),
        logprobs_BT=padded(logprobs, 0.0),
        hazard_logits_BTE=padded(hazard_logits, [np.nan] * 3),
        lengths_B=np.asarray(list(map(len, tokens))),
        truncated_B=np.asarray([row[-1] not in request.eos_ids for row in tokens]),
        completion=lambda row: tokens[row],
    )


def test_each_request_gets_what_it_gets_alone(model, pool):
    """More of them than rows, under policies, temperatures and limits of their own."""
    pool.warm_up()
    programs = ticks.advance._cache_size(), prefill.prefill._cache_size()
    made = drained(pool, REQUESTS)
    once_more = drained(pool, REQUESTS[::-1], steps=3)
    found = ticks.advance._cache_size(), prefill.prefill._cache_size()
    added = tuple(after - before for before, after in zip(programs, found, strict=True))
    assert added == (1, 3), "more programs for top_p, of prefills in their three shapes"
    assert min(len(tokens) for tokens, *_ in made.values()) == 1
    order = iter(made.values())
    for request in REQUESTS:
        rows = [next(order) for _ in request.prompts]
        recorded = dataclasses.replace(request, hazards=True)
        assert_as_teacher_forced(model, recorded, as_rollouts(request, rows))
    by_text = sorted(tokens for tokens, *_ in once_more.values())
    assert by_text == sorted(tokens for tokens, *_ in made.values())


def test_prompts_are_prefilled_together_and_equal_ones_once(pool, monkeypatch):
    groups, prefill_group = [], pool._engine.prefill
    monkeypatch.setattr(
        pool._engine, "prefill",
        lambda jobs, prompts, draws: (
            groups.append(int((prompts[2] < len(pool._jobs)).sum())),
            prefill_group(jobs, prompts, draws),
        ),
    )  # fmt: skip
    drained(pool, [REQUESTS[-1]])
    assert groups == [4, 1]
    drained(pool, [REQUESTS[-2]])
    assert groups == [4, 1, 8, 2, 1]
    tickets = pool.join(REQUESTS[-2])
    pool.turn(1)
    for ticket in tickets[:8]:  # some have rows, some wait for one
        pool.leave(ticket)
    ended = {news.ticket for _ in range(40) for news in pool.turn(1) if news.finished}
    assert ended == set(tickets[8:]) and not pool.under_way


def test_who_leaves_makes_room_and_changes_nothing_for_others(pool):
    wanted = [*drained(pool, [REQUESTS[2], REQUESTS[4]]).values()]
    (stays,), (waits,) = pool.join(REQUESTS[2]), pool.join(REQUESTS[4])
    others = [ticket for _ in range(4) for ticket in pool.join(REQUESTS[0])]
    made = {stays: [], waits: []}
    for turn in range(200):
        news = pool.turn(1)
        if turn == 2:
            for ticket in (*others, 999):  # under way, ready and in the queue; one that is unknown
                pool.leave(ticket)
        elif turn > 2:
            assert not {grown.ticket for grown in news} & set(others)
        for grown in news:
            made.get(grown.ticket, []).extend(grown.tokens)
        if turn > 2 and not news:
            break
    assert [made[stays], made[waits]] == [tokens for tokens, *_ in wanted]


def test_what_a_pool_cannot_do_is_refused(pool):
    for asked, sentence in [
        (request(3, policy=Prescribed(np.ones((1, 20))), key=0), "joins a running pool has one"),
        (request(3, policy=Fixed(3), key=0), "Fixed has depth 3"),
        (request(17, key=0), "a prompt has 17 tokens, but this pool allows at most 16; sh"),
        (
            request(3, max_new_tokens=21, key=0),
            "max_new_tokens is 21, but this pool allows at most 20; lower it",
        ),
        (request(3, samples_per_prompt=2, key=0), "needs samples_per_prompt=1"),
        (request(3, eos_ids=(1,), key=0), r"eos_ids is \(1,\), but a request that joins"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            pool.join(asked)
    assert pool.turn() == []
