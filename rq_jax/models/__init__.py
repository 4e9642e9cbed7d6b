"""The networks, built by name: `create("rqvae" | "rqtransformer" | "discriminator", **settings)`."""

import dataclasses
from types import UnionType
from typing import Any, get_args, get_origin

import flax.linen as nn
import jax
import numpy as np

from rq_jax.models.discriminator import Discriminator
from rq_jax.models.rqtransformer import RQTransformer
from rq_jax.models.rqvae import RQVAE

MODELS = {"rqvae": RQVAE, "rqtransformer": RQTransformer, "discriminator": Discriminator}


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
    if name not in MODELS:
        raise ValueError(f"model name: '{name}' is unknown; allowed are {', '.join(sorted(MODELS))}")
    fields = {f.name: f for f in dataclasses.fields(MODELS[name]) if f.name not in ("parent", "name")}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise ValueError(f"model.{unknown[0]}: unknown setting of '{name}'; allowed are {', '.join(sorted(fields))}")
    missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and settings.get(k) is None]
    if missing:
        raise ValueError(f"model.{missing[0]}: '{name}' needs it and it is not set")
    for key, value in settings.items():
        _check_type(key, value, fields[key].type)
    model = MODELS[name](**{key: _hashable(value) for key, value in settings.items()})
    model.check()
    return model


def settings_of(model: nn.Module) -> dict[str, Any]:
    """The keywords of `create` that make this model, its name included."""
    (name,) = (name for name, kind in MODELS.items() if kind is type(model))
    fields = (f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name"))
    return {"name": name, **{field: getattr(model, field) for field in fields}}


def abstract_variables(model: nn.Module) -> dict[str, Any]:
    """Shapes and dtypes of the model's variables, without computing them."""
    return jax.eval_shape(lambda rng: init_variables(model, rng), jax.random.key(0))


def init_variables(model: nn.Module, rng: jax.Array) -> dict[str, Any]:
    """Fresh variables of the model, drawn from one key."""
    return model.init(rng, *model.example_inputs())


def _check_type(key: str, value: Any, annotation: Any) -> None:
    """Refuse a value that the setting's annotation, such as `int | tuple[int, ...]`, does not allow."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if not any(_fits(value, option) for option in options):
        allowed = str(annotation).replace("<class '", "").replace("'>", "")
        raise ValueError(f"model.{key}: {value!r} is no {allowed}")


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is tuple:
        kind = get_args(option)[0]
        return isinstance(value, (list, tuple)) and all(_fits(item, kind) for item in value)
    if option in (int, float):
        number = (int, np.integer) if option is int else (int, float, np.integer, np.floating)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, option)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, (list, tuple)) else value
