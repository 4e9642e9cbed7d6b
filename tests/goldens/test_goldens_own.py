"""Parity with our own golden vectors, made by loops in NumPy float64 (tests/goldens/make_goldens.py)."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle

from rq_jax import quantize
from rq_jax.models import create
from rq_jax.sampling import filter_logits

DIRECTORY = Path(__file__).parent


def load(name):
    with np.load(DIRECTORY / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_close(actual, expected):
    """Within 1e-5 of the array's largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(oracle.GOLDENS))
def test_the_committed_file_is_what_the_maker_makes(name):
    made, stored = oracle.make(name), load(name)
    assert made.keys() == stored.keys()
    for key, array in made.items():
        np.testing.assert_allclose(stored[key], array, rtol=1e-12, atol=1e-12, err_msg=key)


def test_the_maker_imports_nothing_of_rq_jax_and_the_files_are_small():
    tree = ast.parse((DIRECTORY / "make_goldens.py").read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert imported == {"math", "pathlib", "numpy"}
    assert 0 < sum(path.stat().st_size for path in DIRECTORY.glob("*.npz")) < 300_000


@pytest.mark.parametrize("name", ["shared", "unequal"])
def test_residual_quantisation_and_soft_codes(name):
    golden = load("quantize")
    codebook = golden["codebook"] if name == "shared" else tuple(golden[f"table{d}"] for d in range(3))
    codebook = jnp.asarray(codebook) if name == "shared" else tuple(map(jnp.asarray, codebook))
    depth = golden[f"{name}.codes"].shape[-1]
    result = quantize.residual_quantize(jnp.asarray(golden["x"]), codebook, depth)
    soft, codes = quantize.soft_codes(jnp.asarray(golden["x"]), codebook, depth, 0.5)
    np.testing.assert_array_equal(result.codes, golden[f"{name}.codes"])
    np.testing.assert_array_equal(codes, golden[f"{name}.codes"])
    assert_close(result.partial_sums, golden[f"{name}.partial_sums"])
    assert_close(soft, golden[f"{name}.soft_codes"])


@pytest.mark.parametrize("name", ["plain", "restart"])
def test_three_training_calls(name):
    golden = load("quantize")
    counts_K = jnp.linspace(0.6, 3.0, 7)
    codebook_KE = jnp.asarray(golden["codebook"])
    states = [quantize.CodebookState(codebook_KE, counts_K, codebook_KE * counts_K[:, None])]
    for step in range(3):
        rows = jnp.asarray(golden["candidates"][step])
        candidates = None if name == "plain" else lambda d, x_NE, K, rows=rows: rows[d]
        x = jnp.asarray(golden["batches"][step])
        result, states = quantize.quantize_and_update(x, states, 4, [0.9], "sequential", candidates)
        np.testing.assert_array_equal(result.codes, golden[f"{name}{step}.codes"])
        assert_close(result.partial_sums, golden[f"{name}{step}.partial_sums"])
        for part, array in zip(("codebook", "counts", "sums"), states[0], strict=True):
            assert_close(array, golden[f"{name}{step}.{part}"])


@pytest.mark.parametrize("index", range(len(oracle.FILTERS)))
def test_filtered_distributions(index):
    golden = load("sampling")
    temperature, top_k, top_p = oracle.FILTERS[index]
    actual = filter_logits(jnp.asarray(golden["logits"]), temperature, top_k, top_p)
    np.testing.assert_allclose(actual, golden["probabilities"][index], rtol=0, atol=1e-6)


def test_transformer_forward_pass():
    golden = load("transformer")
    params = {}
    for key, array in golden.items():
        if key.startswith("params."):
            *path, leaf = key.split(".")[1:]
            node = params
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(array)
    model = create(
        "rqtransformer", codebook_size=7, code_shape=(2, 3, 3), code_dim=5, model_dim=8, num_heads=2,
        spatial_layers=2, depth_layers=1, cond_vocab_size=9, cond_length=4,
    )  # fmt: skip
    variables = {"params": params, "codebook": {"codebook_KE": jnp.asarray(golden["codebook"])}}
    output = jax.jit(model.apply)(
        variables, jnp.asarray(golden["codes"].reshape(2, 2, 3, 3)), jnp.asarray(golden["cond"])
    )
    assert_close(output.logits.reshape(2, 6, 3, 7), golden["logits"])
    assert_close(output.cond_logits, golden["cond_logits"])
