"""The choice of an implementation, and what every vocabulary op refuses."""

import jax.numpy as jnp
import pytest

from jexit.kernels import exit_kl, linear_kl, linear_logprob
from jexit.kernels.dispatch import ANYWHERE, ONLY_BY_NAME, Operation
from jexit.kernels.exit_kl import api as exit_kl_api
from jexit.kernels.linear_kl import api as linear_kl_api
from jexit.kernels.linear_logprob import api as linear_logprob_api


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
    for api in (exit_kl_api, linear_kl_api, linear_logprob_api):
        for platform in ANYWHERE:
            assert api.OPERATION.candidates(platform)[-1] == "xla"
            assert "reference" not in api.OPERATION.candidates(platform)


def test_what_does_not_fit_is_refused() -> None:
    h_ND, exits_END, head_VD, ids_N = (
        jnp.zeros((4, 8)), jnp.zeros((1, 4, 8)), jnp.zeros((9, 8)), jnp.zeros(4, int)
    )  # fmt: skip
    whole = jnp.zeros((4, 8), int)
    for op, arguments, message in (
        (
            exit_kl,
            (jnp.zeros((2, 3, 8)), exits_END, head_VD),
            r"h_final_ND has shape \[2, 3.*flatten",
        ),
        (exit_kl, (h_ND, exits_END, head_VD[:, :7]), "h_final_ND has width 8, but head_VD has wid"),
        (exit_kl, (h_ND, h_ND, head_VD), r"h_exits_END has shape \[4, 8\]"),
        (exit_kl, (h_ND, exits_END, head_VD[:0]), "the head has no rows"),
        (exit_kl, (h_ND, exits_END.astype(int), head_VD), "h_exits_END is int32"),
        (linear_kl, (h_ND, h_ND[:3], head_VD), r"h_teacher_ND has shape \[3, 8\].* \[4, 8\]"),
        (linear_kl, (h_ND, whole, head_VD), "h_teacher_ND is int32"),
        (linear_logprob, (whole, head_VD, ids_N), "h_ND is int32"),
        (linear_logprob, (h_ND, head_VD, ids_N[:3]), r"targets_N has shape \[3\],.* require \[4\]"),
        (linear_logprob, (h_ND, head_VD, h_ND[:, 0]), "targets_N is float32, but it must be integ"),
    ):
        with pytest.raises(ValueError, match=f"^{op.__name__}: {message}"):
            op(*arguments)
    for other_head, message in (
        (head_VD[:, :7], "h_teacher_ND has width 8, but head_teacher_VD has width 7"),
        (head_VD[:8], r"head_teacher_VD has shape \[8\], but the other arrays require \[9\]"),
        (head_VD.astype(int), "head_teacher_VD is int32, but it must be floating-point"),
    ):
        with pytest.raises(ValueError, match=f"^linear_kl: {message}"):
            linear_kl(h_ND, h_ND, head_VD, head_teacher_VD=other_head)
    with pytest.raises(ValueError, match=r"linear_kl has no direction 'reverse'.*jeffreys"):
        linear_kl(h_ND, h_ND, head_VD, direction="reverse")
    with pytest.raises(ValueError, match=r"exit_kl has no implementation 'cuda'.*reference, xla"):
        exit_kl(h_ND, exits_END, head_VD, implementation="cuda")
