"""Features of texts by CLIP."""

from types import SimpleNamespace

import numpy as np

from rq_jax.evaluation.prompts import make_text_features


def test_texts_of_all_sets_share_a_program():
    traced = []

    def of_tokens(variables, tokens):
        traced.append(tokens.shape)
        return 2 * tokens

    text_features = make_text_features(SimpleNamespace(variables={"text": {}}, text_features=of_tokens))
    tokens = np.random.default_rng(0).integers(0, 9, (70, 3), np.int32)
    for some in (tokens, tokens[:5]):
        np.testing.assert_array_equal(text_features(some), 2 * some)
    assert traced == [(64, 3)]
