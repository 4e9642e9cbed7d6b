"""Stage 1: train an RQ-VAE tokenizer on pictures.

python train_vae.py --config=configs/rqvae.py:demo --workdir=runs/rqvae [--config.optim.learning_rate=1e-3 ...]
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rq_jax import losses, metrics, models, pictures, sharding, train_loop, train_state
from rq_jax.data import make_dataset

SECTIONS = ("seed", "model", "data", "optim", "loss", "loop", "mesh")
# Below this share of the codebook in use, a depth is called collapsed.
COLLAPSED_USAGE = 0.05
NUM_SHOWN = 12

logger = logging.getLogger(__name__)


class Losses:
    """The weighted sum that stage 1 minimises; the keywords are the config section `loss`."""

    def __init__(self, reconstruction: str = "mse", commitment_weight: float = 0.25):
        if reconstruction not in ("mse", "l1"):
            raise ValueError(
                f"loss.reconstruction: '{reconstruction}' is unknown; allowed are 'mse' and 'l1'"
            )
        self.reconstruction, self.commitment_weight = reconstruction, commitment_weight

    def __call__(self, images: jax.Array, output: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The total and its parts."""
        reconstruction = losses.reconstruction_loss(images, output.reconstruction, self.reconstruction)
        commitment = losses.commitment_loss(output.latents, output.partial_sums)
        total = reconstruction + self.commitment_weight * commitment
        return total, {"reconstruction_loss": reconstruction, "commitment_loss": commitment}


def make_train_step(model, optimizer: train_state.Optimizer, loss: Losses, ema_decay: float):
    """One update of encoder, decoder and codebook: (state, batch) -> (state, metrics)."""

    def train_step(state: train_state.TrainState, batch: dict[str, jax.Array]):
        rngs = state.rng_of_step("restart", "dropout")

        def loss_fn(params):
            variables = {"params": params, **state.model_state}
            output, model_state = model.apply(
                variables, batch["image"], train=True, mutable=["codebook"], rngs=rngs
            )
            total, parts = loss(batch["image"], output)
            return total, (parts, output.codes, model_state)

        (total, (parts, codes, model_state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, update = train_state.apply_gradients(state, optimizer, grads, total, model_state, ema_decay)
        counts_DK = metrics.code_counts(codes, largest_codebook(model))
        return state, {"loss": total, **parts, **update, "code_counts": counts_DK}

    return train_step


def largest_codebook(model) -> int:
    """K, or the largest K_d."""
    return int(np.max(model.codebook_size))


def make_summary(model):
    """Logged scalars from the means of the step's metrics; warns of a collapsing codebook."""
    sizes = np.broadcast_to(model.codebook_size, model.code_shape[-1])

    def summarize(means: dict[str, np.ndarray]) -> dict[str, float]:
        counts_DK = means.pop("code_counts")
        scalars = {name: float(value) for name, value in means.items()}
        for d, (counts_K, K) in enumerate(zip(counts_DK, sizes, strict=True), start=1):
            usage = float(np.mean(counts_K[:K] > 0))
            scalars[f"code_usage/depth{d}"] = usage
            scalars[f"code_perplexity/depth{d}"] = float(metrics.code_perplexity(counts_K[:K]))
            if usage < COLLAPSED_USAGE:
                logger.warning(
                    "CODEBOOK COLLAPSE: depth %d used only %.1f%% of its %d codes since the last log line; "
                    "turn on model.use_restart, lower model.codebook_size or the learning rate", d, 100 * usage, K,
                )  # fmt: skip
        return scalars

    return summarize


def make_evaluation(model, dataset, mesh, loss: Losses):
    """State -> held-out PSNR by depth and loss, and a picture: originals over reconstructions at depth 1..D."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def measure(variables, images, mask):
        output = model.apply(variables, images)
        by_depth = model.apply(variables, images, method="reconstruct_by_depth")
        psnr_DB = metrics.psnr(images, by_depth)
        pictures_loss = jax.vmap(lambda x, y: losses.reconstruction_loss(x, y, loss.reconstruction))
        sums = {
            "psnr": jnp.sum(psnr_DB * mask, axis=1),
            "validation_loss": jnp.sum(pictures_loss(images, output.reconstruction) * mask),
            "count": jnp.sum(mask),
        }
        # Only what is shown leaves the device.
        return sums, (images[:NUM_SHOWN], by_depth[:, :NUM_SHOWN])

    def evaluate(state: train_state.TrainState):
        total, shown = None, None
        for batch in dataset.iterator():
            placed = sharding.put_batch(mesh, {"image": batch["image"], "mask": batch["mask"]})
            sums, first = measure(state.ema_variables, placed["image"], placed["mask"])
            shown = first if shown is None else shown
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        means = {name: np.asarray(value) / float(total["count"]) for name, value in total.items()}
        scalars = {f"psnr/depth{d}": float(value) for d, value in enumerate(means["psnr"], start=1)}
        scalars["validation_loss"] = float(means["validation_loss"])
        originals, by_depth = jax.tree.map(np.asarray, shown)
        rows = {"original": originals}
        for d, images in enumerate(by_depth, start=1):
            rows[f"depth {d}: {means['psnr'][d - 1]:.1f} dB"] = images
        scale = max(1, 96 // originals.shape[1])
        return scalars, {"reconstructions": pictures.labelled_grid(rows, scale=scale)}

    return evaluate


def prepare(config: ConfigDict) -> dict[str, Any]:
    """Everything that a run needs except its state; all settings are checked here, before anything compiles."""
    train_loop.check_sections(config, SECTIONS)
    mesh = train_loop.call(sharding.make_mesh, "mesh", config.mesh)
    model = models.create(**config.model)
    loss = train_loop.call(Losses, "loss", config.loss)
    sharding.check_batch_size(mesh, config.data.batch_size)
    data = dict(config.data, channels=config.model.in_channels)
    if tuple(np.broadcast_to(data["image_size"], 2)) != model.image_shape:
        raise ValueError(
            f"data.image_size: {data['image_size']} differs from model.image_size {model.image_size}; set them equal"
        )
    shard = dict(shard_index=jax.process_index(), shard_count=jax.process_count(), seed=config.seed)
    dataset = train_loop.call(make_dataset, "data", data, split="train", train=True, **shard)
    validation = train_loop.call(make_dataset, "data", data, split="validation", train=False, **shard)
    dataset.examples([0])  # raises where no picture can be read
    loop = train_loop.resolve_durations(config.loop, "loop", ("total",), dataset.steps_per_epoch)
    settings = train_loop.call(train_loop.LoopSettings, "loop", loop)
    optim = train_loop.resolve_durations(config.optim, "optim", ("warmup",), dataset.steps_per_epoch)
    optimizer = train_loop.call(train_state.make_optimizer, "optim", optim, total_steps=settings.total_steps)
    if optimizer.accumulation_steps != 1:
        raise ValueError(
            f"optim.accumulation_steps: {optimizer.accumulation_steps} is for stage 2; the codebook update of stage 1 "
            "needs the whole batch, set it to 1"
        )
    return dict(
        mesh=mesh,
        model=model,
        loss=loss,
        dataset=dataset,
        validation=validation,
        settings=settings,
        optimizer=optimizer,
    )


def init_state(config: ConfigDict, run: dict[str, Any]) -> train_state.TrainState:
    """The state at step 0, drawn on the devices where it will live."""

    def init(rng: jax.Array) -> train_state.TrainState:
        rng_init, rng_train = jax.random.split(rng)
        variables = models.init_variables(run["model"], rng_init)
        return train_state.create_state(variables, run["optimizer"], rng_train, run["settings"].ema_decay > 0)

    rng = jax.random.key(config.seed)
    shardings = sharding.state_shardings(run["mesh"], jax.eval_shape(init, rng))
    return jax.jit(init, out_shardings=shardings)(rng)


def train_and_evaluate(config: ConfigDict, workdir: str) -> train_state.TrainState:
    """Train a tokenizer as `config` says, in `workdir`, going on from its newest checkpoint.

    Returns:
      The last state.

    Raises:
      ValueError, FileNotFoundError: bad settings or data, before anything compiles.
    """
    run = prepare(config)
    state = init_state(config, run)
    train_step = make_train_step(run["model"], run["optimizer"], run["loss"], run["settings"].ema_decay)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    state = train_loop.run(
        workdir=workdir,
        config=config.to_dict(),
        title="stage 1",
        state=state,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        dataset=run["dataset"],
        mesh=run["mesh"],
        settings=run["settings"],
        summarize=make_summary(run["model"]),
        evaluate=make_evaluation(run["model"], run["validation"], run["mesh"], run["loss"]),
    )
    names = ["loss", "validation_loss", *(f"psnr/depth{d + 1}" for d in range(run["model"].code_shape[-1]))]
    train_loop.finish(workdir, names)
    return state


if __name__ == "__main__":
    train_loop.main(train_and_evaluate)
