"""How anything is trained: `run` drives a recipe over its data; optimizers, settings, logs. Knows no model."""

from rq_jax.training.loop import Recipe, run
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.settings import LoopSettings
from rq_jax.training.state import TrainState

__all__ = ["LoopSettings", "Optimizer", "Recipe", "TrainState", "make_optimizer", "run"]
