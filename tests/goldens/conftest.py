"""The official DQ-Transformers, which the tests of the model and of its sampler share."""

import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

from rq_jax import models
from rq_jax.interop import official
from rq_jax.interop.official.rules import Table


class Golden(NamedTuple):
    """A model with the weights of the original, and the original's inputs and outputs."""

    model: nn.Module
    variables: Any
    io: dict[str, np.ndarray]
    table: Table
    zero_up_to_rounding: set[str]
    settings: dict[str, Any]


@pytest.fixture(scope="module", params=("dqt-uncond", "dqt-class"))
def dq_transformer(request, dq_goldens) -> Golden:
    name = request.param
    config = json.loads((dq_goldens / f"{name}.config.json").read_text())
    settings = official.dqtransformer_settings(config)
    model, table = models.create("dqtransformer", **settings), official.dqtransformer_table(settings)
    with np.load(dq_goldens / f"{name}.state.npz") as state:
        variables = official.dqtransformer_variables(dict(state), settings)
    with np.load(dq_goldens / f"{name}.io.npz") as file:
        io = dict(file)
    tolerances = json.loads((dq_goldens / "tolerances.json").read_text())[name]
    zeros = {key for key, entry in tolerances.items() if isinstance(entry, dict) and entry.get("zero_up_to_rounding")}
    return Golden(model, jax.device_put(variables), io, table, zeros, config["golden"])
