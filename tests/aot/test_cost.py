"""FLOPs and collectives of compiled modules against counts by hand, loops as often as they run."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jexit.aot.cost import cost_of, largest_arrays
from jexit.aot.hlo import parse

L, B, D, F = 6, 16, 32, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def shapes(mesh, *arrays):
    """Arguments without values: (shape, partition) each."""
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*parts)))
        for shape, parts in arrays
    ]


def stack(up_LDF, down_LFD, h_BD):
    def layer(h_BD, weights):
        up_DF, down_FD = weights
        return jnp.tanh(jnp.tanh(h_BD @ up_DF) @ down_FD), None

    return jax.lax.scan(layer, h_BD, (up_LDF, down_LFD))[0]


@pytest.fixture(scope="module")
def tensor_parallel(mesh):
    """A scanned stack whose every layer ends in one all-reduce of [B, D] over eight devices."""
    arguments = shapes(
        mesh,
        ((L, D, F), (None, None, "x")),
        ((L, F, D), (None, "x", None)),
        ((B, D), (None, None)),
    )
    out = NamedSharding(mesh, P(None, None))
    return jax.jit(stack, out_shardings=out).lower(*arguments).compile().as_text()


def test_a_sharded_scan_counts_every_layer(tensor_parallel):
    cost = cost_of(parse(tensor_parallel))
    assert cost.flops == L * 2 * (2 * B * D * F) / 8
    assert cost.collectives == {"all-reduce": (L, L * B * D * 4)}
    assert not cost.unknown and not cost.at_most and not cost.kernels


def test_trips_follow_from_the_counter_where_xla_does_not_say_them(tensor_parallel):
    text, said = re.subn(r'"known_trip_count":\{"n":"\d+"\},?', "", tensor_parallel)
    assert said == 1
    assert cost_of(parse(text)) == cost_of(parse(tensor_parallel))


def test_parameters_divided_over_fsdp_are_gathered_a_layer_at_a_time(mesh):
    arguments = shapes(
        mesh, ((L, D, F), (None, "x")), ((L, F, D), (None, None, "x")), ((B, D), ("x",))
    )
    text = jax.jit(stack).lower(*arguments).compile().as_text()
    cost = cost_of(parse(text))
    assert cost.flops == L * 2 * (2 * B * D * F) / 8
    # Two matrices a layer, whole on every device after the gathering.
    assert cost.collectives["all-gather"] == (2 * L, 2 * L * D * F * 4)


def test_gradients_and_accumulation_multiply(mesh):
    """A loop in a loop: micro-batches of a stack, forward and backward."""

    def loss(weights, h_MBD):
        def one(total, h_BD):
            gradients = jax.grad(lambda weights: stack(*weights, h_BD).sum())(weights)
            return jax.tree.map(jnp.add, total, gradients), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, weights), h_MBD)[0]

    weights = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((L, D, F), (L, F, D))]
    h_MBD = jax.ShapeDtypeStruct((3, B, D), jnp.float32)
    cost = cost_of(parse(jax.jit(loss).lower(weights, h_MBD).compile().as_text()))
    products = 2 * B * D * F
    # Forward two products a layer; backward two for each, one of them the gradient to the input.
    assert cost.flops == 3 * L * 6 * products


def test_a_loop_that_ends_by_itself_counts_once_and_one_with_a_bound_at_most(mesh):
    def until_small(h_BB, limit):
        return jax.lax.while_loop(
            lambda h_BB: jnp.max(h_BB) > limit, lambda h_BB: h_BB @ h_BB, h_BB
        )

    def at_most_five(h_BB, limit):
        def goes_on(carry):
            return (carry[0] < 5) & (jnp.max(carry[1]) > limit)

        return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, c[1] @ c[1]), (0, h_BB))[1]

    arguments = (jax.ShapeDtypeStruct((B, B), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    cost = cost_of(parse(jax.jit(until_small).lower(*arguments).compile().as_text()))
    assert cost.flops == 2 * B**3
    assert len(cost.unknown) == 1 and "while" in next(iter(cost.unknown))
    cost = cost_of(parse(jax.jit(at_most_five).lower(*arguments).compile().as_text()))
    assert cost.flops == 5 * 2 * B**3
    assert len(cost.at_most) == 1 and not cost.unknown


def test_a_loop_that_the_caller_knows_counts_by_its_scope():
    def until_small(h_BB, limit):
        with jax.named_scope("layers"):
            return jax.lax.while_loop(
                lambda h_BB: jnp.max(h_BB) > limit, lambda h_BB: h_BB @ h_BB, h_BB
            )

    arguments = (jax.ShapeDtypeStruct((B, B), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32))
    module = parse(jax.jit(until_small).lower(*arguments).compile().as_text())
    cost = cost_of(module, loops={"layers": 7, "fill": 0})
    assert cost.flops == 7 * 2 * B**3
    assert len(cost.at_most) == 1 and not cost.unknown
    assert cost_of(module, loops={"fill": 0}).flops == 2 * B**3


def test_a_conditional_counts_by_the_share_of_its_dearest_branch():
    def at_exits(h_BB, exits_L):
        def layer(h_BB, leaves):
            return jax.lax.cond(leaves, lambda: h_BB @ h_BB, lambda: h_BB), None

        return jax.lax.scan(layer, h_BB, exits_L)[0]

    arguments = (jax.ShapeDtypeStruct((B, B), jnp.float32), jax.ShapeDtypeStruct((8,), bool))
    module = parse(jax.jit(at_exits).lower(*arguments).compile().as_text())
    assert cost_of(module).flops == 8 * 2 * B**3
    assert cost_of(module, branch_share=0.25).flops == 2 * 2 * B**3


def test_the_largest_arrays_are_named_with_where_they_come_from(mesh):
    def outer(x_N):
        return jnp.sort(x_N[:, None] * x_N, axis=0).sum()

    argument = jax.ShapeDtypeStruct((300,), jnp.float32)
    module = parse(jax.jit(outer).lower(argument).compile().as_text())
    array, name = largest_arrays(module, 1)[0]
    assert str(array) == "f32[300,300]" and array.bytes == 360_000
    assert "jit(outer)" in name


PRELUDE = """HloModule m
{more}
ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {{
  %x = bf16[4,8]{{1,0}} parameter(0)
{lines}
}}
"""


def module_of(*lines, more=""):
    return parse(PRELUDE.format(more=more, lines="\n".join(f"  {line}" for line in lines)))


def test_of_arrays_alike_the_one_with_a_name_is_named():
    made = [
        "%a = f32[9,9]{1,0} broadcast(%c)",
        '%b = f32[9,9]{1,0} add(%a, %a), metadata={op_name="jit(f)/add"}',
        '%d = f32[9,9]{1,0} multiply(%b, %b), metadata={op_name="jit(f)/mul"}',
        '%e = f32[7,9]{1,0} broadcast(%c), metadata={op_name="e"}',
        "%t = (f32[7,9]{1,0}, f32[9,9]{1,0}) tuple(%e, %d)",
        "%w = (f32[7,9]{1,0}, f32[9,9]{1,0}) while(%t), condition=%no, body=%same, "
        'metadata={op_name="jit(f)/while"}',
        "%g = f32[3,9]{1,0} broadcast(%c)",
    ]
    more = "".join(
        f"%{name} (p: f32[]) -> f32[] {{\n  ROOT %p = f32[] parameter(0)\n}}\n"
        for name in ("no", "same")
    )
    found = largest_arrays(module_of(*made, more=more), 3)
    assert [(str(array), name) for array, name in found] == [
        ("f32[9,9]", "jit(f)/add"), ("f32[7,9]", "jit(f)/while"), ("f32[3,9]", "g")
    ]  # fmt: skip


def test_kinds_of_collectives_with_the_bytes_that_they_produce():
    cost = cost_of(
        module_of(
            "%a = bf16[16,8]{1,0} all-gather(%x), dimensions={0}",
            "%b = (f32[16]{0}, /*index=1*/f32[2,2]{1,0}) all-reduce-start(%y, %z), channel_id=1",
            "%bd = (f32[16]{0}, f32[2,2]{1,0}) all-reduce-done(%b)",
            "%c = f32[16]{0} all-reduce(%y), channel_id=2",
            "%d = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)}) all-gather-start(%x)",
            "%e = (f32[9]{0}, f32[9]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y)",
            "%f = (f32[9]{0}) fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1",
            "%g = f32[16]{0} add(%y, %y)",
            more="%all-reduce-scatter.1 (p: f32[72]) -> f32[9] {\n"
            "  %p = f32[72]{0} parameter(0)\n"
            "  %r = f32[72]{0} all-reduce(%p), to_apply=%sum\n"
            "  ROOT %s = f32[9]{0} dynamic-slice(%r)\n}\n"
            "%sum (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n",
        )
    )
    assert cost.collectives == {
        "all-gather": (2, 2 * 16 * 8 * 2),
        "all-reduce": (2, 16 * 4 + 4 * 4 + 16 * 4),
        "collective-permute": (1, 36),
        "reduce-scatter": (1, 36),
    }


def test_products_that_a_tpu_computes_as_convolutions():
    # Eight heads [48, 320, 24] · [48, 4, 24]: the heads are a window of size 4 over padding.
    batched = cost_of(
        module_of(
            "%l = bf16[4,48,96]{2,1,0} parameter(1)",
            "%r = bf16[96,24,4]{2,1,0} parameter(2)",
            "%c = bf16[4,48,24]{2,1,0} convolution(%l, %r), "
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_io0->0bf",
        )
    )
    assert batched.flops == 2 * 48 * 96 * 24 * 4
    plain = cost_of(
        module_of(
            "%l = bf16[48,96]{1,0} parameter(1)",
            "%r = bf16[96,24]{1,0} parameter(2)",
            "%c = bf16[48,24]{1,0} convolution(%l, %r), dim_labels=bf_io->bf",
        )
    )
    assert plain.flops == 2 * 48 * 96 * 24


def test_kernels_count_by_their_own_account_and_without_one_are_named():
    told = (
        'custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"body":"x","cost_estimate":{"flops":"1200","transcendentals":"1"}}}'
    )
    assert cost_of(module_of(f"%k = f32[4]{{0}} {told}")).flops == 1200
    silent = 'custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="kl"}'
    cost = cost_of(module_of(f"%k = f32[4]{{0}} {silent}"))
    assert cost.flops == 0 and cost.kernels == {"kl"}
    gemm = (
        'custom-call(%x, %r), custom_call_target="__cublas$gemm", backend_config={"gemm_backend'
        '_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    )
    product = f"%k = (bf16[4,5]{{1,0}}, s8[1024]{{0}}) {gemm}"
    right = "%r = bf16[8,5]{1,0} parameter(1)"
    assert cost_of(module_of(right, product)).flops == 2 * 4 * 5 * 8
