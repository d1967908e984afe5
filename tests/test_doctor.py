"""`python -m jexit.doctor`: agreement with definitions, and what it says of a broken kernel."""

import dataclasses
import importlib.metadata as metadata
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jexit import kernels
from jexit.doctor import __main__ as doctor
from jexit.doctor import agreement, speed
from jexit.kernels.dispatch import Implementation
from jexit.kernels.linear_kl.api import OPERATION


@pytest.mark.slow
def test_what_runs_here_agrees() -> None:
    checks = list(agreement.checks())
    assert {check.operation for check in checks} == {
        *("exit_kl", "linear_kl", "linear_logprob", "decode_attention", "attention"),
    }
    assert all(check.dtype in agreement.TOLERANCE and not check.failure for check in checks)
    assert all(0 < check.error < agreement.TOLERANCE[check.dtype] for check in checks)


def test_a_broken_kernel_is_named(monkeypatch, capsys) -> None:
    """It does not compile, gives no number, or has a gradient that is off by a hundredth."""
    right = OPERATION._implementations["xla"].function

    def raises(*_, **__):
        raise RuntimeError("out of shared memory\nand a page of details")

    def not_a_number(*arguments, **settings):
        return right(*arguments, **settings).at[3].set(jnp.nan)

    def wrong_gradient(h_student_ND, *rest, **settings):
        kl_N = right(h_student_ND, *rest, **settings)
        return kl_N + 0.05 * (kl_N - jax.lax.stop_gradient(kl_N))

    asked: list[bool] = []  # whether kernels are timed
    monkeypatch.setattr(speed, "timings", lambda arch, kernels: asked.append(kernels) or ())
    every = agreement.cases
    monkeypatch.setattr(
        agreement, "cases", lambda: [case for case in every() if case.operation == "linear_kl"]
    )
    remedies = {
        "xla": "no setting avoids it, so install another release of jax",
        "pallas": "set --config.model.kernels=xla",
    }
    for function, name, said in (
        (raises, "xla", r"it does not run \(out of shared memory\); "),
        (not_a_number, "pallas", ".* KL is not finite at the entries where the reference is fini"),
        (wrong_gradient, "xla", "the gradient of .* differs from the reference by 5.0e-02, .* 1e"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(OPERATION._implementations, name, Implementation(function, ("cpu",)))
            assert doctor.main([]) == 1
        error = capsys.readouterr().err
        pattern = f"^jexit: the {name} implementation of linear_kl fails in float32: {said}"
        assert re.search(pattern, error), error
        assert all(remedies[name] in line for line in error.splitlines()), error
    assert not any(asked)
    assert doctor.main([]) == 0 and asked[-1]
    assert "Every implementation agrees" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_attention_is_not_timed(monkeypatch) -> None:
    """Neither the model nor the kernels may choose what failed."""
    found = []
    monkeypatch.setattr(
        speed,
        "_measured",
        lambda model, name, on_cpu: found.append((name, model.execution.attention)) or [],
    )
    small = dataclasses.replace(speed.SMALL, layers=6, vocab_size=64)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(speed, "target", lambda on=platform: types.SimpleNamespace(platform=on))
        for kernels_work in (False, True):
            assert list(speed.timings(small, kernels=kernels_work)) == []
    assert found == [("xla", "xla")] * 3 + [("auto", "auto"), ("xla", "xla")]


def test_the_versions_that_decide_what_runs_are_named() -> None:
    for name in ("jax", "jaxlib", "flax", "optax"):
        assert f"{name} {metadata.version(name)}" in doctor.machine()[1].split(", ")


def test_a_setting_takes_the_place_of_what_the_platform_picks() -> None:
    h_ND, head_VD = jnp.ones((2, 4)), jnp.ones((8, 4))
    with kernels.using("nowhere"), pytest.raises(ValueError, match="no implementation 'nowhere'"):
        kernels.linear_kl(h_ND, h_ND, head_VD)
    with kernels.using("reference"):
        assert kernels.linear_kl(h_ND, h_ND, head_VD).shape == (2,)


@pytest.mark.slow
def test_the_whole_table(capsys) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for work in ("decoding, full depth", "decoding, depth 5 of 10", "calibration step",
                 "reinforcement step"):  # fmt: skip
        assert re.search(rf"{work} +xla +[\d,]+ +[\d,.]+", printed), printed
