"""The networks, built by name: `create(name, **settings)` with a name in `MODELS`."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from rq_jax.models.autoencoder import Autoencoder
from rq_jax.models.discriminator import Discriminator
from rq_jax.models.dqtransformer import DQTransformer
from rq_jax.models.dqvae import DQVAE
from rq_jax.models.rqtransformer import RQTransformer
from rq_jax.models.rqvae import RQVAE
from rq_jax.settings import checks
from rq_jax.settings.construct import construct

MODELS = {
    "rqvae": RQVAE,
    "dqvae": DQVAE,
    "rqtransformer": RQTransformer,
    "dqtransformer": DQTransformer,
    "discriminator": Discriminator,
}
TOKENIZERS = tuple(name for name, kind in MODELS.items() if issubclass(kind, Autoencoder))


def create(name: str, **settings: Any) -> nn.Module:
    """Build a model from its settings; they are checked here, before anything compiles.

    Args:
      name: a key of `MODELS`.
      **settings: attributes of that model's class; lists become tuples, so that a model is hashable.

    Returns:
      A linen module. Its variables are plain nested dicts: {"params": ..., "codebook": ...}.

    Raises:
      ValueError: an unknown name or setting, a missing setting, or settings that do not fit together.
    """
    checks.one_of("model name", name, MODELS)
    section = "discriminator" if name == "discriminator" else "model"
    model = construct(MODELS[name], section, settings, parent=None, name=None)  # the last two are Flax's own
    model.check()
    return model


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The keywords of `create` that make this model, its name included."""
    (name,) = (name for name, kind in MODELS.items() if kind is type(model))
    fields = (f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name"))
    return {"name": name, **{field: getattr(model, field) for field in fields}}


def abstract_variables(model: nn.Module) -> dict[str, Any]:
    """Shapes and dtypes of the model's variables, without computing them."""
    try:
        hash(model)
    except TypeError:  # made by hand, with a list among its settings
        return _trace_variables.__wrapped__(model)
    return jax.tree.map(lambda leaf: leaf, _trace_variables(model))  # a dict of the caller's own


# Tracing the networks takes seconds where they are large, and a process asks for the same ones again.
@functools.lru_cache(maxsize=16)
def _trace_variables(model: nn.Module) -> dict[str, Any]:
    return jax.eval_shape(lambda rng: init_variables(model, rng), jax.random.key(0))


def init_variables(model: nn.Module, rng: jax.Array) -> dict[str, Any]:
    """Fresh variables of the model, drawn from one key."""
    return model.init(rng, *model.example_inputs())
