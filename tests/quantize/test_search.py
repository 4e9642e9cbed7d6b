"""The search in slices of the vectors, which a CPU takes where there are many; blocks of codes are in test_quantize.py."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rq_jax import quantize
from rq_jax.quantize import search

K, E = 7, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def small_slices(monkeypatch):
    """Vectors are taken in slices of at most 8 on a CPU."""
    monkeypatch.setattr(search, "_VECTORS_PER_SLICE", 8)
    helpers.forget_searches()
    yield
    helpers.forget_searches()


@pytest.mark.parametrize("N", [16, 17, 32, 77])
def test_slices_of_vectors_change_no_code(small_slices, monkeypatch, N):
    monkeypatch.setattr(search, "_SCORES_PER_BLOCK", 1)  # blocks of 128 codes
    x_NE, codebook_KE = normal(N, E), normal(300, E, seed=1)
    codes_N = quantize.nearest_codes(x_NE, codebook_KE)
    assert codes_N.tolist() == [oracle.nearest(x_E, codebook_KE) for x_E in x_NE]


def test_an_exported_program_takes_any_number_of_vectors():
    codebook_KE, (n,) = normal(300, E, seed=1), export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, E), jnp.float32), jax.ShapeDtypeStruct(codebook_KE.shape, jnp.float32)
    program = export.export(jax.jit(quantize.nearest_codes))(*shapes)
    for N in (1, 77):
        x_NE = normal(N, E)
        assert program.call(x_NE, codebook_KE).tolist() == [oracle.nearest(x_E, codebook_KE) for x_E in x_NE]


def test_slices_of_vectors_save_memory_on_a_cpu_and_are_left_alone_elsewhere():
    shapes = jax.ShapeDtypeStruct((2**16, 4), jnp.float32), jax.ShapeDtypeStruct((512, 4), jnp.float32)

    def temporaries(function):
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(quantize.nearest_codes) < 0.5 * temporaries(search._search)

    def loops(function, platform):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")

    assert loops(quantize.nearest_codes, "cpu") > loops(search._search, "cpu") == loops(quantize.nearest_codes, "cuda")


@pytest.mark.parametrize("N", [64, 72])
def test_slices_of_vectors_stay_on_their_devices(small_slices, N):
    """Every device searches for its own part of each slice."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over_data = jax.sharding.NamedSharding(mesh, P("data"))
    x_NE, codebook_KE = normal(N, E), normal(K, E, seed=1)
    search = jax.jit(quantize.nearest_codes, in_shardings=(over_data, None), out_shardings=over_data)
    assert search(x_NE, codebook_KE).tolist() == [oracle.nearest(x_E, codebook_KE) for x_E in x_NE]
    if N == 64:
        assert "all-gather" not in search.lower(x_NE, codebook_KE).compile().as_text()


def test_slices_of_vectors_work_under_vmap_grad_and_shard_map(small_slices):
    x_BNE, codebook_KE = normal(3, 40, E), normal(K, E, seed=1)
    expected = [[oracle.nearest(x_E, codebook_KE) for x_E in x_NE] for x_NE in x_BNE]
    assert jax.vmap(quantize.nearest_codes, (0, None))(x_BNE, codebook_KE).tolist() == expected
    gradient = jax.grad(lambda x: jnp.sum((x - codebook_KE[quantize.nearest_codes(x, codebook_KE)]) ** 2))(x_BNE[0])
    np.testing.assert_allclose(gradient, 2 * (x_BNE[0] - codebook_KE[np.array(expected[0])]), rtol=1e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    search = jax.shard_map(quantize.nearest_codes, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert search(x_BNE[0], codebook_KE).tolist() == expected[0]


def test_many_vectors_compile_once_outside_of_a_program(small_slices, caplog):
    x_NE, codebook_KE = normal(51, E), normal(K, E, seed=1)
    quantize.nearest_codes(x_NE, codebook_KE)
    with jax.log_compiles():
        quantize.nearest_codes(2 * x_NE, codebook_KE)
    assert [record.message for record in caplog.records if "XLA compilation" in record.message] == []
