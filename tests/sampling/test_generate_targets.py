"""The sampler as the compilers of an H100 and of a TPU v5e see it, where their packages are installed; no device is needed."""

import functools
import importlib.util
import math
import re

import helpers
import hlo
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from toy_transformer import B, build, h, w

from rq_jax.sampling import generate

# What XLA needs to know of an H100: a GpuTargetConfig in text form.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
"""
TARGETS = {
    "H100": (
        ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"),
        ("h100", "cuda"),
        {"target_config": H100, "topology": "1x1x1"},
    ),
    "TPU v5e": (("libtpu",), ("v5e:2x2", "tpu"), {}),
}
FILTERS = {"none": {}, "top-k and top-p": {"top_k": 5, "top_p": 0.9}}


def is_installed(package):
    parent = package.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(package) is not None


@functools.cache
def compiled_text(target, filters):
    """Text of the program that draws B images for a target, and the abstract variables that it reads."""
    packages, names, options = TARGETS[target]
    if missing := [package for package in packages if not is_installed(package)]:
        pytest.skip(f"{missing[0]} is not installed")
    sharding = SingleDeviceSharding(topologies.get_topology_desc(*names, **options).devices[0])
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
    if target == "H100":  # the text for a TPU names no trip counts
        assert counts.unknown_loops == 0 and counts.loop_ops["fusion"]


@pytest.mark.slow
def test_bfloat16_weights_are_read_as_they_are():
    text, rest = compiled_text("H100", "none")
    sizes = {leaf.size for leaf in jax.tree.leaves(rest["params"]) if leaf.dtype == jnp.bfloat16}
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* convert\(", text)
    widened = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert len(sizes) > 3 and widened and not sizes & widened
