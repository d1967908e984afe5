"""`linear_logprob` and its gradients against float64, by every implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernels import truth

from jexit.kernels import LinearLogprob, linear_logprob
from jexit.kernels.linear_logprob import api, pallas_gpu, pallas_tpu, xla
from jexit.losses.masked import masked_sum

truth.register_small_tiles(
    api.OPERATION,
    xla.linear_logprob,
    pallas_tpu.linear_logprob,
    pallas_gpu.linear_logprob,
)
OUTPUTS = LinearLogprob._fields


def expected(
    h_ND: Any, head_VD: Any, targets_N: Any, weights: dict[str, Any], temperature: float = 1.0
) -> tuple[LinearLogprob, np.ndarray, np.ndarray]:
    """Outputs, and the gradients of their weighted sum to the states and the head.

    A target that does not exist contributes minus the normaliser.
    """
    z_NV = truth.logits(h_ND, head_VD) / temperature
    log_NV = truth.log_softmax(z_NV)
    p_NV, entropy_N = np.exp(log_NV), truth.entropy(log_NV)
    hit_NV = np.asarray(targets_N)[:, None] == np.arange(z_NV.shape[1])
    target_N = np.where(hit_NV.any(-1), np.sum(hit_NV * log_NV, axis=-1), -np.inf)
    of_target_N1, of_entropy_N1, of_logsumexp_N1 = (
        np.asarray(weights.get(name, np.zeros(len(z_NV))), np.float64)[:, None] for name in OUTPUTS
    )
    dz_NV = of_target_N1 * (hit_NV - p_NV) + of_logsumexp_N1 * p_NV
    dz_NV -= of_entropy_N1 * p_NV * (log_NV + entropy_N[:, None])
    dz_NV /= temperature
    out = LinearLogprob(target_N, entropy_N, truth.logsumexp(z_NV))
    return out, dz_NV @ truth.float64(head_VD), dz_NV.T @ truth.float64(h_ND)


@functools.cache
def compiled(implementation: str, temperature: float = 1.0) -> Any:
    """Outputs, those beside a gradient, gradient to the states alone, to states and head."""

    def loss(h_ND: Any, head_VD: Any, targets_N: Any, weights: Any) -> Any:
        out = linear_logprob(
            h_ND, head_VD, targets_N, temperature=temperature, implementation=implementation
        )
        return sum(masked_sum(getattr(out, name), w_N) for name, w_N in weights.items()), out

    def everything(*arguments: Any) -> Any:
        alone_ND, _ = jax.grad(loss, has_aux=True)(*arguments)
        (dh_ND, dhead_VD), out = jax.grad(loss, (0, 1), has_aux=True)(*arguments)
        return loss(*arguments)[1], out, alone_ND, dh_ND, dhead_VD

    return jax.jit(everything)


def check(
    implementation: str,
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: Any,
    outputs: tuple[str, ...] = OUTPUTS,
    temperature: float = 1.0,
) -> LinearLogprob:
    """Outputs, and the gradients of a weighted sum of `outputs`, against the truth.

    Some rows are masked out and hold NaN, as padding may: they must reach no gradient. The
    reference, whose gradient JAX derives, has 0 · NaN there.
    """
    count, dtype = h_ND.shape[0], h_ND.dtype.name
    weights = {name: truth.normal(i, count).at[1::4].set(0) for i, name in enumerate(outputs)}
    live_N = np.arange(count) % 4 != 1
    wanted, wanted_ND, wanted_VD = expected(h_ND, head_VD, targets_N, weights, temperature)
    if implementation != "reference":
        h_ND = jnp.where(live_N[:, None], h_ND, jnp.nan)
    found = compiled(implementation, temperature)(h_ND, head_VD, targets_N, weights)
    plain, out, alone_ND, dh_ND, dhead_VD = found
    assert alone_ND.dtype == dh_ND.dtype == h_ND.dtype and dhead_VD.dtype == head_VD.dtype
    for name, value_N in zip(OUTPUTS, wanted, strict=True):
        assert getattr(out, name).dtype == jnp.float32
        for given, what in ((plain, name), (out, f"{name} beside a gradient")):
            truth.assert_close(getattr(given, name)[live_N], value_N[live_N], dtype, what)
    truth.assert_close(alone_ND, wanted_ND, dtype, "gradient to the states alone")
    truth.assert_close(dh_ND, wanted_ND, dtype, "gradient to the states")
    truth.assert_close(dhead_VD, wanted_VD, head_VD.dtype.name, "gradient to the head")
    return out


# The first and the last token, those around a tile's edge, and repeated ones.
TARGETS_13 = (0, 96, 96, 31, 32, 33, 63, 64, 65, 95, 5, 5, 5)


@truth.every
def test_every_output_and_its_gradients_at_any_shape(implementation):
    for tokens, width, vocab, dtype, of_head, outputs, temperature in (
        (13, 24, 97, "float32", "float32", OUTPUTS, 1.0),
        (13, 24, 97, "bfloat16", "bfloat16", ("logprob_N",), 0.7),
        (37, 16, 129, "float32", "bfloat16", ("logprob_N", "entropy_N"), 1.0),
        (1, 7, 2, "float32", "float32", OUTPUTS, 1.5),
    ):
        targets_N = np.resize(np.asarray(TARGETS_13) % vocab, tokens)
        h_ND = truth.normal(0, tokens, width, dtype=dtype)
        head_VD = truth.normal(1, vocab, width, dtype=of_head)
        check(implementation, h_ND, head_VD, targets_N, outputs, temperature)
    nothing = (jnp.zeros((0, 8)), jnp.zeros((9, 8)), jnp.zeros(0, jnp.int32))
    out = linear_logprob(*nothing, implementation=implementation)
    assert [value.shape for value in out] == [(0,)] * 3


@truth.with_chip_tiles
@truth.beyond_a_tile
def test_covers_more_than_a_tile(implementation, tokens, vocab):
    h_ND, head_VD = truth.normal(0, tokens, 8), truth.normal(1, vocab, 8)
    check(implementation, h_ND, head_VD, vocab - 1 - np.arange(tokens))


@truth.streaming
def test_extreme_logits_lose_nothing(implementation):
    h_ND, _, head_VD = truth.extreme()
    out = check(implementation, h_ND, head_VD, np.asarray([2, *range(1, 10)]))
    assert np.nanmin(out.logprob_N) <= -10_000
    assert np.nanmin(out.entropy_N) >= 0


@truth.streaming
def test_certain_and_flat_distributions_are_exact_to_a_few_digits(implementation):
    """The log-probability of a nearly certain target is tiny, and not 0."""
    op = jax.jit(functools.partial(linear_logprob, implementation=implementation))
    h_ND = jnp.array([[12.0], [14.0], [15.0]])
    out = op(h_ND, jnp.array([[1.0], [0.0], [0.0]]), jnp.zeros(3, jnp.int32))
    wanted_N = -np.log1p(2 * np.exp(-truth.float64(h_ND)[:, 0]))
    np.testing.assert_allclose(out.logprob_N, wanted_N, rtol=0, atol=1.2e-7)
    out = op(jnp.zeros((3, 8)), truth.normal(1, 97, 8), jnp.array([0, 50, 96]))
    np.testing.assert_allclose(out.logprob_N, -np.log(97), rtol=3e-7)
    np.testing.assert_allclose(out.entropy_N, np.log(97), rtol=3e-7)


@truth.every
def test_a_target_that_does_not_exist_has_no_probability(implementation):
    """Masked by `where`, as losses do, it has no gradient; unmasked, its normaliser's."""
    h_ND, head_VD = truth.normal(0, 6, 8), truth.normal(1, 97, 8)
    targets_N = jnp.array([1, -1, 97, 2**31 - 1, 2, 96])
    exists_N = (targets_N >= 0) & (targets_N < 97)
    for weight_N in (exists_N.astype(jnp.float32), jnp.ones(6)):
        wanted, wanted_ND, wanted_VD = expected(h_ND, head_VD, targets_N, {"logprob_N": weight_N})
        found = compiled(implementation)(h_ND, head_VD, targets_N, {"logprob_N": weight_N})
        _, out, alone_ND, dh_ND, dhead_VD = found
        np.testing.assert_array_equal(out.logprob_N == -jnp.inf, ~exists_N)
        truth.assert_close(out.entropy_N, wanted.entropy_N, "float32", "entropy_N")
        truth.assert_close(alone_ND, wanted_ND, "float32", "gradient to the states alone")
        truth.assert_close(dh_ND, wanted_ND, "float32", "gradient to the states")
        truth.assert_close(dhead_VD, wanted_VD, "float32", "gradient to the head")


def test_targets_of_narrow_or_unsigned_integers():
    h_ND, head_VD = truth.normal(0, 4, 8), truth.normal(1, 1100, 8)
    for dtype in (np.int8, np.uint32):
        check("xla", h_ND, head_VD, np.asarray([0, 1, 100, 127], dtype))
