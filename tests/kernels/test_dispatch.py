"""The choice of an implementation: by name, or the most special that covers the call."""

import pytest

from jexit.kernels.dispatch import ANYWHERE, ONLY_BY_NAME, Operation


def refuse(reason: str) -> str:
    raise NotImplementedError(reason)


def test_the_most_special_implementation_goes_first_and_hands_over() -> None:
    operation = Operation("op")
    operation.register("plain", lambda value: f"plain {value}", platforms=ANYWHERE)
    operation.register("special", lambda _: refuse("only even widths"), platforms=("cpu",))
    operation.register("truth", lambda _: "truth", platforms=ONLY_BY_NAME)
    assert operation.candidates("cpu") == ("special", "plain")
    assert operation.candidates("tpu") == ("plain",)
    assert operation(None, 3) == "plain 3"
    assert operation("truth", 3) == "truth"


def test_a_named_implementation_runs_or_raises() -> None:
    operation = Operation("op")
    operation.register("plain", lambda _: "plain")
    operation.register("special", lambda _: refuse("only even widths"), platforms=("cpu",))
    with pytest.raises(NotImplementedError, match=r"^only even widths$"):
        operation("special", 3)
    with pytest.raises(ValueError, match="op has no implementation 'other'; use None or one of "):
        operation("other", 3)


def test_when_none_covers_the_call_every_reason_is_named() -> None:
    operation = Operation("op")
    operation.register("one", lambda _: refuse("too wide"))
    operation.register("two", lambda _: refuse("too long"))
    with pytest.raises(NotImplementedError, match=r"op .*\(one: too wide; two: too long\)"):
        operation(None, 3)


def test_every_vocabulary_op_has_the_portable_implementation_everywhere() -> None:
    from jexit.kernels.exit_kl import api as exit_kl
    from jexit.kernels.linear_kl import api as linear_kl
    from jexit.kernels.linear_logprob import api as linear_logprob

    for operation in (exit_kl.OPERATION, linear_kl.OPERATION, linear_logprob.OPERATION):
        for platform in ANYWHERE:
            assert operation.candidates(platform)[-1] == "xla"
            assert "reference" not in operation.candidates(platform)
