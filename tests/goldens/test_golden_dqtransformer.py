"""The DQ-Transformer against the original PyTorch code: logits, hidden states, losses and gradients.

Arrays agree within 1e-5 of their largest value, gradients within 1e-4.
"""

import flax
import helpers
import jax
import numpy as np
import pytest
from toy_transformer import run

from rq_jax import losses
from rq_jax.grains import GrainedCodes, PackedCodes, pack

SINGLES = [f"single.{j}" for j in range(7)]


def assert_close(actual, expected, name: str = "", tolerance: float = 1e-5) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def streams(dq_transformer, case) -> tuple[PackedCodes, np.ndarray | None]:
    """The coarse block and the fine one behind it, pads and all; start tokens without their class, and the classes."""
    layout, io = dq_transformer.model.layout, dq_transformer.io
    content, position, grain = (
        np.concatenate([io[f"{case}.coarse_{kind}"], io[f"{case}.fine_{kind}"]], axis=1).astype(np.int32)
        for kind in ("content", "position", "seg")
    )
    content = np.minimum(content, layout.content_sos)[..., None]
    position = np.minimum(position, np.where(grain == 0, layout.position_sos(0), layout.position_sos(1)))
    labels = None
    if dq_transformer.model.is_conditional:
        labels = io["labels"][:5] if case == "batch" else io["labels"][[int(case.split(".")[1])]]
    return PackedCodes(content, position, grain, np.full(len(grain), grain.shape[1])), labels


def objective(nats: losses.StreamNats) -> dict[str, jax.Array]:
    """The original's losses: means of each stream, the plain average of those of positions, content plus position."""
    coarse, fine = nats.position.sum(0) / nats.position_counts.sum(0)
    content, position = nats.content.sum() / nats.content_counts.sum(), (coarse + fine) / 2
    return {
        "coarse_position_loss": coarse,
        "fine_position_loss": fine,
        "position_loss": position,
        "content_loss": content,
        "total_loss": content + position,
    }


def measure(model, output) -> losses.StreamNats:
    return losses.stream_nats(output.position_logits, output.content_logits, output.tokens, model.layout)


@pytest.mark.parametrize("case", helpers.others_slow(["batch", *SINGLES], ["batch", "single.0", "single.3"]))
def test_logits_and_losses(dq_transformer, case):
    model, variables, io, *_ = dq_transformer
    packed, labels = streams(dq_transformer, case)
    if case != "batch":  # no pads: what packing gives
        j = int(case.split(".")[1])
        codes = GrainedCodes(io["codes"][[j], ..., None].astype(np.int32), io["grain_map"][[j]].astype(np.int32))
        dense = pack(codes, model.layout, packed.position.shape[1])
        for ours, theirs in zip(dense[:3], packed[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    output = model.apply(variables, packed, labels)
    assert_close(output.position_logits, io[f"{case}.position_logits"], "position")
    assert_close(output.content_logits[:, :, 0], io[f"{case}.content_logits"], "content")
    for name, value in objective(measure(model, output)).items():
        if f"{case}.{name}" in io:
            assert_close(value, io[f"{case}.{name}"], name)


def test_hidden_states(dq_transformer):
    model, variables, io, *_ = dq_transformer
    tokens = model.apply(variables, *streams(dq_transformer, "batch"), method="tokens")
    known, following = (PackedCodes(*(ids[:, s] for ids in tokens[:3]), None) for s in (slice(-1), slice(1, None)))
    hidden, _, _ = run(model, variables, known, method="position")
    assert_close(hidden, io["batch.position_hidden"])
    assert_close(run(model, variables, hidden, following, method="content")[0], io["batch.content_hidden"])


def test_gradients(dq_transformer):
    model, variables, io, table, zeros, _ = dq_transformer
    packed, labels = streams(dq_transformer, "batch")

    @jax.jit
    def gradient(params):
        def total(params):
            return objective(measure(model, model.apply({"params": params}, packed, labels)))["total_loss"]

        return jax.grad(total)(params)

    by_path = flax.traverse_util.flatten_dict(gradient(variables["params"]), sep="/")
    layout, compared = model.layout, 0
    # torch gives padding rows no gradient.
    padding = {
        "content_emb": layout.content_pad,
        "content_coarse_pos_emb": layout.position_pad(0),
        "content_fine_pos_emb": layout.position_pad(1),
    }
    for rule in table.rules:
        for key, ours in zip(
            rule.keys, rule.write(np.asarray(by_path[rule.path.removeprefix("params/")])), strict=True
        ):
            for table_name, row in padding.items():
                if f".{table_name}." in key:
                    ours[row] = 0
            norm = f"batch.grad_norm.{key}"
            if norm in zeros:
                assert np.linalg.norm(ours) < 1e-6, key
            else:
                assert_close(np.linalg.norm(ours), io[norm], norm, 1e-4)
            compared += 1
            if f"batch.grad.{key}" in io:
                assert_close(ours, io[f"batch.grad.{key}"], key, 1e-4)
    assert compared == sum(name.startswith("batch.grad_norm.") for name in io)
