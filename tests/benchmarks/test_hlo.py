"""What is read out of compiled programs: collectives, loops and kernels, as the compilers of three platforms write them."""

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import hlo

MIB = 2**20


def compiled_text(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().as_text()


def sharded(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_collectives_of_a_product_that_is_split():
    """(64, 1024) by (1024, 256), both split along the 1024: each device has a sum of 64 x 256 to add up."""
    mesh = helpers.make_mesh(data=8)
    text = compiled_text(
        lambda a, b: a @ b, sharded(mesh, (64, 1024), None, "data"), sharded(mesh, (1024, 256), "data")
    )
    (found,) = hlo.collectives(text)
    assert found == hlo.Collective("all-reduce", (("f32", (64, 256)),), 1, tuple(range(8)))
    assert found.bytes == 4 * 64 * 256 and found.bytes_sent == 2 * 7 / 8 * found.bytes
    assert hlo.count_compiled(text).flops == 2 * 64 * 256 * 1024 / 8


def test_collectives_in_loops_count_their_turns():
    mesh = helpers.make_mesh(data=2, fsdp=4)

    def function(x, weights):
        step = lambda x, w: (jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec("data"))), None)  # noqa: E731
        return jax.lax.scan(step, x, weights)[0]

    text = compiled_text(function, sharded(mesh, (64, 256), "data"), sharded(mesh, (5, 256, 256), None, "fsdp"))
    found = hlo.collectives(text)
    assert sum(each.times for each in found) == 5 and {each.group_size for each in found} == {4}
    launched, in_loops = hlo.kernels(text)
    assert launched > in_loops >= 5 * 2


# Shortened from what the compilers write.
GPU = """
%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %start = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %done = f32[32,16]{1,0} all-gather-done(%start)
  %reduce-scatter = f32[8,16]{1,0} reduce-scatter(%done), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
}
%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]) parameter(0)
}
ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %while = (s32[], f32[8,16]) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""
TPU = """
%all-reduce-scatter.1 (input: bf16[64,4]) -> bf16[8,4] {
  %input = bf16[64,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = bf16[64,4]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = bf16[8,4]{1,0:T(8,128)} dynamic-slice(%all-reduce.2)
}
%body (p: (s32[], bf16[64,4])) -> (s32[], bf16[64,4]) {
  %p = (s32[], bf16[64,4]) parameter(0)
  %x = bf16[64,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %fusion = bf16[8,4]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (p: (s32[], bf16[64,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %p = (s32[], bf16[64,4]) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%turn, %bound), direction=LT
}
ENTRY %main (x: bf16[64,4]) -> bf16[64,4] {
  %x = bf16[64,4]{1,0:T(8,128)} parameter(0)
  %while = (s32[], bf16[64,4]) while(%x), condition=%condition, body=%body
}
"""


def test_the_text_of_a_gpu():
    gathered, scattered = hlo.collectives(GPU)
    assert gathered == hlo.Collective("all-gather", (("f32", (32, 16)),), 3, (0, 1, 2, 3))
    assert scattered == hlo.Collective("reduce-scatter", (("f32", (32, 16)),), 3, (0, 1, 2, 3))
    assert gathered.bytes_sent == 3 / 4 * 4 * 32 * 16
    assert hlo.count_compiled(GPU).unknown_loops == 0


def test_a_collective_in_two_halves_counts_once():
    """Its type names operands and results."""
    started = GPU.replace("f32[8,16]{1,0} reduce-scatter(", "((f32[32,16]), f32[8,16]) reduce-scatter-start(")
    assert started != GPU and hlo.collectives(started) == hlo.collectives(GPU)


def test_the_axis_of_a_reduce_scatter():
    _, scattered = hlo.collectives(GPU.replace("dimensions={0}", "dimensions={1}"))
    assert scattered.arrays == (("f32", (8, 64)),)


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("source_target_pairs={{0,4},{4,0}}", (0, 4)),
    ],
)
def test_who_takes_part(text, group):
    program = "HloModule m, num_partitions=8\nENTRY %main (x: f32[4]) -> f32[4] {\n"
    program += f"  ROOT %all-reduce = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, to_apply=%add\n}}\n"
    assert [each.group for each in hlo.collectives(program)] == [group]


def test_a_product_that_a_tpu_writes_as_a_convolution():
    """(2048, 4) x (4, 3 x 2 x 16): of 3 x 2 taps one meets the input, the others padding."""
    text = """ENTRY %main (x: bf16[512,4,4,1,1], w: bf16[3,2,16,4,1]) -> bf16[512,4,3,2,16] {
  %x = bf16[512,4,4,1,1]{4,3,2,1,0} parameter(0)
  %w = bf16[3,2,16,4,1]{4,3,2,1,0} parameter(1)
  ROOT %y = bf16[512,4,3,2,16]{4,3,2,1,0} convolution(%x, %w), window={size=1x3x2 pad=0_0x2_2x1_1}, dim_labels=b0f12_12oi0->b012f
}
"""
    assert hlo.count_compiled(text).flops == 2 * 2048 * 4 * 3 * 2 * 16


def test_one_branch_of_a_conditional_runs():
    branch = "%b{0} (x: f32[4]) -> f32[4] {{\n{1}}}\n"
    line = "  %n{0} = f32[4]{{0}} negate(%x)\n"
    program = branch.format(0, line.format(0)) + branch.format(1, line.format(1) + line.format(2))
    program += "ENTRY %main (x: f32[4]) -> f32[4] {\n  ROOT %c = f32[4]{0} conditional(%x), branch_computations={%b0, %b1}\n}\n"
    assert hlo.kernels(program) == (2, 0)


def test_the_text_of_a_tpu():
    """Its loops have a counter and a bound; a reduce-scatter is an all-reduce in a computation of that name."""
    assert hlo.collectives(TPU) == [hlo.Collective("reduce-scatter", (("bf16", (64, 4)),), 6, tuple(range(8)))]
    assert hlo.count_compiled(TPU).unknown_loops == 0
    open_loop = TPU.replace("direction=LT", "direction=NE")
    assert hlo.count_compiled(open_loop).unknown_loops == 1


def test_a_loop_that_ends_by_a_condition_is_told():
    text = compiled_text(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), jnp.zeros(3))
    assert hlo.count_compiled(text).unknown_loops == 1


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="the text has no ENTRY computation; give compiled.as_text()"):
        hlo.collectives("module @jit_step {\n}\n")
