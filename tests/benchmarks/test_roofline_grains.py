"""Bytes that a DQ-Transformer moves while it samples, against its weights, its cache and a loop over the steps."""

import jax
import pytest
import toy_dqtransformer
from toy_dqtransformer import DEEP, TEXT, THREE

from benchmarks import roofline
from rq_jax.models.flops import transformer_flops

TOKENS = 11


@pytest.mark.parametrize("settings", [{}, TEXT, THREE, DEEP], ids=["plain", "text", "three grains", "depth two"])
def test_bytes_of_sampling(settings):
    model, variables = toy_dqtransformer.build(**settings)
    depth, width, layout = model.code_shape[-1], model.model_dim, model.layout
    read = roofline.weights_read(model, "int8", TOKENS)

    def kernels(name):
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"][name])
        return sum(x.size for path, x in leaves if "norm" not in str(path) and "bias" not in str(path))

    for name in ("position", "content"):
        assert read[name] == (TOKENS - 1) * kernels(f"{name}_stack")
    classes = layout.position_size(model.num_grains - 1) + depth * layout.content_size
    assert read["classifier"] == (TOKENS - 1) * width * classes

    held = {"position": model.text_length, "content": 0}
    rows = dict.fromkeys(held, 0)
    for name in held:
        rows[name] += held[name]  # written with the first token
        for _ in range(TOKENS - 1):
            held[name] += 1
            rows[name] += held[name] + 1  # read, and the row of this token written
    row, traffic = 2 * width * 2, roofline.cache_traffic(model, "bfloat16", TOKENS)
    for name in held:
        assert traffic[name] == row * getattr(model, f"{name}_layers") * rows[name]

    cache = jax.eval_shape(lambda: model.init_cache(1))
    kept = sum(x.size * 4 for x in jax.tree.leaves(cache) if x.ndim > 2)
    # No more is read of the last token.
    last = row * 2 * (model.position_layers + model.content_layers)
    assert roofline.cache_size(model, "float32") == kept - last


def test_work_of_sampling_grows_with_the_tokens_of_an_image():
    model, _ = toy_dqtransformer.build()
    work = roofline.sampling_work(model, 3, "float32", tokens=TOKENS)
    flops = transformer_flops(model, tokens=TOKENS)
    assert {name: part.flops for name, part in work.items()} == {name: 3 * value for name, value in flops.items()}
    longest = roofline.sampling_work(model, 3, "float32")
    assert longest == roofline.sampling_work(model, 3, "float32", tokens=model.layout.max_tokens)
    assert all(longest[name].bytes > part.bytes and longest[name].flops > part.flops for name, part in work.items())
