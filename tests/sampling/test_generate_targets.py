"""The sampler as the compilers of an H100 and of a TPU v5e see it, where their packages are installed; no device is needed."""

import functools
import math
import re

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from toy_transformer import B, build, h, w

from benchmarks import hlo, targets
from rq_jax.sampling import generate

TARGETS = "h100:1", "v5e:2x2"
FILTERS = {"none": {}, "top-k and top-p": {"top_k": 5, "top_p": 0.9}}


@functools.cache
def compiled_text(target, filters):
    """Text of the program that draws B images for a target, and the abstract variables that it reads."""
    try:
        device = targets.find(target).devices[0]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    sharding = SingleDeviceSharding(device)
    model, variables = build(model_dim=64, code_shape=(h, w, 2), dtype="bfloat16")

    def draw(variables, rng, image_ids, values):
        return generate(model, variables, rng, B, image_ids=image_ids, **values)

    rest = jax.eval_shape(lambda: model.for_inference(variables, "bfloat16"))
    values = {name: jnp.asarray(value) for name, value in FILTERS[filters].items()}
    arguments = rest, jax.random.key(0), jnp.arange(B), values
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with helpers.full_optimization():
        return jax.jit(draw).lower(*shapes).compile().as_text(), rest


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_only_loop_is_that_over_positions_and_nothing_in_it_branches(target, filters):
    """Each loop without a known trip count and each conditional on a GPU is a wait for the host."""
    text, _ = compiled_text(target, filters)
    counts = hlo.count_compiled(text)
    assert len(re.findall(r" while\(", text)) == 1 and "conditional" not in counts.ops
    assert counts.unknown_loops == 0 and counts.loop_ops["fusion"]


@pytest.mark.slow
def test_bfloat16_weights_are_read_as_they_are():
    text, rest = compiled_text("h100:1", "none")
    sizes = {leaf.size for leaf in jax.tree.leaves(rest["params"]) if leaf.dtype == jnp.bfloat16}
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* convert\(", text)
    widened = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert len(sizes) > 3 and widened and not sizes & widened
