"""The DQ-Transformer's sampler `as_released` against recorded runs of the original: greedy codes, filtered distributions."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.grains import PackedCodes, unpack
from rq_jax.sampling import generate
from rq_jax.sampling.as_released import Carry, code_probabilities, position_probabilities

GREEDY = {
    "greedy.0": {}, "topk1.0": {"temperature": 0.9, "top_k": 1, "position_top_k": 1},
    "greedy_free_fine.0": {"as_released": "free"},
}  # fmt: skip
GREEDY_BY_CLASS = {"greedy.1": {}, "greedy.2": {}, "greedy_batch": {}}
RECORDED = [(model, run) for model in ("dqt-uncond", "dqt-class") for run in GREEDY]
RECORDED += [("dqt-class", run) for run in GREEDY_BY_CLASS]


def recorded(dq_transformer, run):
    """The stream of a run with start tokens in front of both blocks, where the fine one starts, the classes."""
    layout, io = dq_transformer.model.layout, dq_transformer.io
    blocks = []
    for g, block in enumerate(("coarse", "fine")):
        content, position = (io[f"{run}.{block}_{kind}"].astype(np.int32) for kind in ("content", "position"))
        start = np.ones((len(content), 1), np.int32)
        content = np.concatenate([start * layout.content_sos, content], axis=1)
        position = np.concatenate([start * layout.position_sos(g), position], axis=1)
        blocks.append((content, position, np.full_like(position, g)))
    content, position, grain = (np.concatenate(pair, axis=1) for pair in zip(*blocks, strict=True))
    labels = dq_transformer.io.get("sample_labels")
    if labels is not None and "batch" not in run:
        labels = labels[[int(run.split(".")[1])]]
    length = np.full(len(content), content.shape[1], np.int32)
    return PackedCodes(content[..., None], position, grain, length), blocks[0][0].shape[1], labels


QUICK = [("dqt-uncond", "greedy.0"), ("dqt-uncond", "greedy_free_fine.0"), ("dqt-class", "greedy_batch")]


@pytest.mark.parametrize("dq_transformer, run", helpers.others_slow(RECORDED, QUICK), indirect=["dq_transformer"])
def test_greedy_runs(dq_transformer, run):
    model, variables, io, *_ = dq_transformer
    tokens, _, labels = recorded(dq_transformer, run)
    expected = unpack(jax.tree.map(jnp.asarray, tokens), model.layout).codes
    settings = {"temperature": 0.0, "as_released": "fixed", **(GREEDY | GREEDY_BY_CLASS)[run]}
    drawn = generate(model, variables, jax.random.key(0), len(tokens.content), labels, **settings)
    np.testing.assert_array_equal(drawn.codes, expected.codes)
    np.testing.assert_array_equal(drawn.grains, expected.grains)
    if f"{run}.unpacked" in io:
        np.testing.assert_array_equal(drawn.codes[..., 0], io[f"{run}.unpacked"])


@pytest.mark.parametrize("run", ["drawn.0", "drawn_batch"])
def test_the_distributions_that_a_run_was_drawn_from(dq_transformer, run):
    model, variables, io, *_ = dq_transformer
    values = dq_transformer.settings["drawn"]
    filters = (
        (values["temperature"], values["top_k_pos"], values["top_p_pos"]),
        ([values["temperature"]], [values["top_k"]], [values["top_p"]]),
    )
    tokens, fine_start, labels = recorded(dq_transformer, run)
    B, P = tokens.position.shape
    cond = jnp.zeros((B, 1), jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)[:, None]

    def apply(method, *args):
        return model.apply(variables, *args, method=method)

    @functools.partial(jax.jit, static_argnums=0)
    def positions(kind, carry):
        return position_probabilities(model, apply, kind, filters[0], cond, carry)

    codes = jax.jit(lambda carry, hidden: code_probabilities(model, apply, filters[1], cond, carry, hidden))
    compared = 0
    for t in range(P - 1):
        if t + 1 == fine_start:
            continue
        is_coarse, step = t + 1 < fine_start, t if t + 1 < fine_start else t - 1
        has_ended = tokens.content[:, t, 0] == model.layout.content_pad
        known = np.arange(P) <= t
        pads = (model.layout.content_pad, model.layout.position_pad(1), 1)
        content, position, grain = (
            np.where(known.reshape(1, -1, *[1] * (ids.ndim - 2)), ids, pad)
            for ids, pad in zip(tokens[:3], pads, strict=True)
        )
        carry = Carry(
            jnp.int32(t), PackedCodes(content, position, grain, tokens.length),
            jnp.int32(P if is_coarse else fine_start), jnp.asarray(has_ended),
        )  # fmt: skip
        probabilities, hidden = positions("fixed", carry)
        if is_coarse:
            np.testing.assert_allclose(probabilities, io[f"{run}.position_probs"][step], rtol=0, atol=1e-5)
        position[:, t + 1], grain[:, t + 1] = tokens.position[:, t + 1], tokens.grain[:, t + 1]
        probabilities = codes(carry, hidden)
        expected = io[f"{run}.content_probs"][step]
        goes_on = expected[:, model.layout.content_pad] == 0
        np.testing.assert_allclose(
            probabilities[goes_on], expected[goes_on][:, : model.codebook_size], rtol=0, atol=1e-5
        )
        assert not expected[goes_on][:, model.codebook_size :].any()
        compared += goes_on.sum()
    assert compared == (tokens.content < model.codebook_size).sum()
