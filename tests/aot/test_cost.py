"""FLOPs and collectives of compiled modules against counts by hand, loops as often as they run."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jexit.aot.cost import cost_of, largest_arrays
from jexit.aot.hlo import parse

L, B, D, F = 6, 16, 32, 64
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def text_of(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def stack(up_LDF, down_LFD, h_BD):
    def layer(h_BD, weights):
        up_DF, down_FD = weights
        return jnp.tanh(jnp.tanh(h_BD @ up_DF) @ down_FD), None

    return jax.lax.scan(layer, h_BD, (up_LDF, down_LFD))[0]


def divided(*parts):
    """The arguments of `stack` over eight devices, and the sharding of what it returns."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    places = [NamedSharding(mesh, P(*axes)) for axes in parts]
    shapes = ((L, D, F), (L, F, D), (B, D))
    arguments = [array(*s, sharding=place) for s, place in zip(shapes, places, strict=True)]
    return arguments, NamedSharding(mesh, P(None, None))


def test_a_sharded_scan_counts_every_layer():
    """Every layer ends in one all-reduce of [B, D]."""
    arguments, whole = divided((None, None, "x"), (None, "x"), ())
    text = text_of(stack, *arguments, out_shardings=whole)
    cost = cost_of(parse(text))
    assert cost.flops == L * 2 * (2 * B * D * F) / 8
    assert cost.collectives == {"all-reduce": (L, L * B * D * 4)}
    assert not cost.unknown and not cost.at_most and not cost.kernels
    # Trips follow from the counter where XLA does not say them.
    text, said = re.subn(r'"known_trip_count":\{"n":"\d+"\},?', "", text)
    assert said == 1 and cost_of(parse(text)) == cost


def test_parameters_divided_over_fsdp_are_gathered_a_layer_at_a_time():
    arguments, _ = divided((None, "x"), (None, None, "x"), ("x",))
    cost = cost_of(parse(text_of(stack, *arguments)))
    assert cost.flops == L * 2 * (2 * B * D * F) / 8
    # Two matrices a layer, whole on every device after the gathering.
    assert cost.collectives["all-gather"] == (2 * L, 2 * L * D * F * 4)


def test_gradients_and_accumulation_multiply():
    """A loop in a loop: micro-batches of a stack, forward and backward."""

    def loss(weights, h_MBD):
        def one(total, h_BD):
            gradients = jax.grad(lambda weights: stack(*weights, h_BD).sum())(weights)
            return jax.tree.map(jnp.add, total, gradients), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, weights), h_MBD)[0]

    text = text_of(loss, [array(L, D, F), array(L, F, D)], array(3, B, D))
    # Forward two products a layer; backward two for each, one of them the gradient to the input.
    assert cost_of(parse(text)).flops == 3 * L * 6 * (2 * B * D * F)


def test_a_loop_that_ends_by_itself_counts_once_or_by_a_bound():
    """Of its own, or one that the caller knows by its scope."""

    def until_small(h_BB, limit):
        with jax.named_scope("layers"):
            return jax.lax.while_loop(
                lambda h_BB: jnp.max(h_BB) > limit, lambda h_BB: h_BB @ h_BB, h_BB
            )

    def at_most_five(h_BB, limit):
        def goes_on(carry):
            return (carry[0] < 5) & (jnp.max(carry[1]) > limit)

        return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1, c[1] @ c[1]), (0, h_BB))[1]

    module = parse(text_of(until_small, array(B, B), SCALAR))
    bounded = parse(text_of(at_most_five, array(B, B), SCALAR))
    for cost, rounds, known in (
        (cost_of(module), 1, False),
        (cost_of(module, loops={"fill": 0}), 1, False),
        (cost_of(module, loops={"layers": 7, "fill": 0}), 7, True),
        (cost_of(bounded), 5, True),
    ):
        assert cost.flops == rounds * 2 * B**3
        assert len(cost.at_most) == known and len(cost.unknown) == (not known)
        assert all("while" in where for where in cost.unknown)


def test_a_conditional_counts_by_the_share_of_its_dearest_branch():
    def at_exits(h_BB, exits_L):
        def layer(h_BB, leaves):
            return jax.lax.cond(leaves, lambda: h_BB @ h_BB, lambda: h_BB), None

        return jax.lax.scan(layer, h_BB, exits_L)[0]

    module = parse(text_of(at_exits, array(B, B), array(8, dtype=bool)))
    assert cost_of(module).flops == 8 * 2 * B**3
    assert cost_of(module, branch_share=0.25).flops == 2 * 2 * B**3


PRELUDE = """HloModule m
{more}
ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {{
  %x = bf16[4,8]{{1,0}} parameter(0)
{lines}
}}
"""


def module_of(*lines, more=""):
    return parse(PRELUDE.format(more=more, lines="\n".join(f"  {line}" for line in lines)))


def test_the_largest_arrays_are_named_with_where_they_come_from():
    """Of arrays alike the one with a name."""

    def outer(x_N):
        return jnp.sort(x_N[:, None] * x_N, axis=0).sum()

    largest, name = largest_arrays(parse(text_of(outer, array(300))), 1)[0]
    assert str(largest) == "f32[300,300]" and largest.bytes == 360_000
    assert "jit(outer)" in name
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


def test_a_collective_that_overlaps_with_products_counts_once():
    """TPUs repeat it, with its channel, in every fusion during which it is under way."""

    def fusion(name, target):
        root = f'custom-call(%h), custom_call_target="{target}"' if target else "tuple(%h)"
        return (
            f"%{name} (p: bf16[4,8]) -> (bf16[16,8]) {{\n  %p = bf16[4,8]{{1,0}} parameter(0)\n"
            "  %h = bf16[16,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}\n"
            f"  ROOT %o = (bf16[16,8]{{1,0}}) {root}\n}}\n"
        )

    targets = {"begin": "AsyncCollectiveStart", "middle": "", "end": "AsyncCollectiveDone"}
    lines = [
        f"%{name[0]} = (bf16[16,8]{{1,0}}) fusion(%x), kind=kLoop, calls=%{name}"
        for name in ("begin", "middle", "middle", "end")
    ]
    alone = "%a = bf16[16,8]{1,0} all-gather(%x), channel_id=8, dimensions={0}"
    more = "".join(fusion(*pair) for pair in targets.items())
    cost = cost_of(module_of(*lines, alone, more=more))
    assert cost.collectives == {"all-gather": (2, 2 * 16 * 8 * 2)}


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
