"""Operations of a DQ-Transformer by part, against its traced program; those of an RQ-Transformer are in test_roofline."""

import jax
import pytest
from toy_dqtransformer import KINDS, B, M, U, build, conds, pack

from rq_jax.models.flops import count_traced, transformer_flops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fewer", [0, 3])
def test_the_forward_pass_of_packed_codes(kind, fewer):
    model, variables = build(**KINDS[kind])
    P, D, text = model.layout.max_tokens - fewer, model.code_shape[-1], U if kind == "text" else 0
    arguments = variables, pack(model, tokens=model.layout.max_tokens - fewer), conds(model)
    counted = count_traced(model.apply, *jax.eval_shape(lambda *arrays: arrays, *arguments))
    flops = transformer_flops(model, tokens=P)
    assert flops.keys() == {"position", "content", "classifier", *(["depth"] if D > 1 else [])}
    expected = sum(flops.values())
    if text:
        expected += transformer_flops(model, train=True)["condition"] / 3
    # Without a cache attention also multiplies what its mask hides.
    stacks = [
        (model.position_layers, text + P - 1, 1),
        (model.content_layers, P - 1, 1),
        (model.depth_layers, D, P - 1),
    ]
    expected += sum(layers * times * 4 * M * S * (S - 1) / 2 for layers, S, times in stacks)
    assert counted.flops == B * expected
    longest = transformer_flops(model, tokens=model.layout.max_tokens, train=True)
    assert transformer_flops(model, train=True) == longest and sum(longest.values()) >= 3 * sum(flops.values())
