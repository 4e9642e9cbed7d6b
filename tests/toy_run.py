"""A run of a toy model through the training loop, which the tests of the loop and of its faults share."""

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.devices import sharding
from rq_jax.training.loop import run
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.settings import LoopSettings
from rq_jax.training.state import apply_gradients, create_state

TOTAL = 12
BATCH, FEATURES = 8, 3
MESH = sharding.make_mesh()
OPTIMIZER = make_optimizer(learning_rate=0.1, total_steps=TOTAL, warmup_steps=2, clip_norm=1.0)


class ToyDataset:
    """Batches that depend on their position alone; `faults` maps positions to what happens before they are read."""

    batch_size = BATCH

    def __init__(self, faults=None):
        self.faults, self.position, self.closed = faults or {}, 0, False

    def iterator(self):
        self.position, self.closed = 0, False
        return self

    def __next__(self):
        if self.position in self.faults:
            self.faults[self.position]()
        rng = np.random.default_rng(self.position)
        self.position += 1
        return {
            "x": rng.normal(size=(BATCH, FEATURES)).astype(np.float32),
            "index": np.full(BATCH, self.position, np.int32),
        }

    def get_state(self):
        return {"next_batch": self.position}

    def set_state(self, state):
        self.position = state["next_batch"]

    def close(self):
        self.closed = True


def init(rng):
    params = {"w_M": jax.random.normal(rng, (FEATURES,))}
    variables = {"params": params, "seen": {"order": jnp.zeros(TOTAL, jnp.int32)}}
    return create_state(variables, OPTIMIZER, rng, use_ema=True)


SHARDINGS = sharding.state_shardings(MESH, jax.eval_shape(init, jax.random.key(0)))
draw_state = jax.jit(init, out_shardings=SHARDINGS)


def toy_step(state, batch, optimizer=OPTIMIZER):
    noise = jax.random.normal(state.rng_of_step("noise")["noise"], (BATCH,))

    def loss_fn(params):
        return jnp.mean((batch["x"] @ params["w_M"] - batch["x"].sum(1) + 0.1 * noise) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    index = batch["index"][0]
    model_state = {"seen": {"order": state.model_state["seen"]["order"].at[state.step].set(index)}}
    state, update = apply_gradients(state, optimizer, grads, loss, model_state, 0.9)
    return state, {"loss": loss, **update, "index": index, "pair": jnp.stack([index, 10 * index])}


jitted_step = jax.jit(toy_step, donate_argnums=0, out_shardings=(SHARDINGS, None))


def evaluate(state):
    return {"validation_loss": float(jnp.sum(state.ema_params["w_M"] ** 2))}, {"dot": np.zeros((2, 3, 3), np.uint8)}


@dataclasses.dataclass(frozen=True)
class ToyRecipe:
    """A linear model; `figures` are those of an evaluation, `one_step` its jitted step, `phases` begin at their steps."""

    figures: Callable = evaluate
    one_step: Callable = jitted_step
    phases: tuple = ()
    config: dict = dataclasses.field(default_factory=lambda: {"model": {"name": "toy"}})

    title, criterion, seed, mesh, optimizer, accumulates = "toy", "validation_loss", 7, MESH, OPTIMIZER, True
    model = SimpleNamespace(dtype="float32", use_remat=True)
    flops_per_image, curves = None, ("loss", "validation_loss")

    def start(self, workdir, data, is_fresh):
        return self, data

    def init(self, rng):
        return draw_state(rng)

    def phase(self, step):
        return sum(step >= first for first in self.phases)

    def step(self, state, batch, phase):
        return self.one_step(state, batch)

    def summarize(self, means):
        assert all(isinstance(value, np.ndarray | np.floating) for value in means.values())
        first, second = means["pair"]
        scalars = {name: float(value) for name, value in means.items() if name != "pair"}
        return {**scalars, "first": first, "second": second}

    def evaluate(self, state, batch):
        return {}, None

    def report(self, state, sums, shown):
        return self.figures(state)


def train(
    workdir, dataset=None, evaluate=evaluate, held_out=None, step=jitted_step, strict=False, phases=(), **settings
):
    settings = {"log_every_steps": 1, "evaluate_every_steps": 5, "checkpoint_every_steps": 5, **settings}
    data = SimpleNamespace(
        train=ToyDataset() if dataset is None else dataset,
        validation=helpers.HeldOut() if held_out is None else held_out,
    )
    recipe = ToyRecipe(evaluate, step, phases)
    return run(recipe, data, LoopSettings(**{"total_steps": TOTAL, **settings}), str(workdir), strict=strict)


def saved_steps(workdir, kind="checkpoints"):
    return sorted(int(path.name) for path in (workdir / kind).iterdir())


def metrics_of(workdir):
    """Logged values by (step, name), without rates and memory; a pair that is logged twice is an error."""
    values = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            assert (step, name) not in values
            values[step, name] = value
    return {key: value for key, value in values.items() if not helpers.is_of_the_machine(key[1])}


def assert_same_run(state, workdir, uninterrupted):
    expected, whole = uninterrupted
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert state.rng == expected.rng
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(state.model_state["seen"]["order"], np.arange(1, TOTAL + 1))
    assert metrics_of(workdir) == metrics_of(whole)
