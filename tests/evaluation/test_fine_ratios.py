"""Fine ratios that one tokenizer is measured at: refusals; figures by way of the script, in test_evaluate_grains.py."""

from types import SimpleNamespace

import pytest

from rq_jax.evaluation import fine_ratios


@pytest.mark.parametrize(
    ("ratios", "num_grains", "message"),
    [
        ((0.3, 1.0), 2, r"^--grains: 1.0 is outside \(0, 1\); without it, use one grain less$"),
        ((0.0,), 2, r"^--grains: 0.0 is outside \(0, 1\)"),
        ((float("nan"),), 2, r"^--grains: nan is outside \(0, 1\)"),
        ((0.3, 0.5, 0.3), 2, "^--grains: 0.3,0.5,0.3 names one twice; give different ones$"),
        ((0.3,), 1, "^--grains: 'a' has no grains; give a DQ-VAE of two grains, or leave it out$"),
        ((0.3,), 3, "^--grains: 'a' has 3 grains, whose shares one ratio does not set; give a DQ-VAE of two grains"),
    ],
)
def test_refused(ratios, num_grains, message):
    loaded = SimpleNamespace(model=SimpleNamespace(num_grains=num_grains))
    with pytest.raises(ValueError, match=message):
        fine_ratios.check(ratios, {"a": loaded})
