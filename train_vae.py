"""Stage 1: train an RQ-VAE tokenizer on pictures.

python train_vae.py --config=configs/rqvae.py:demo --workdir=runs/rqvae [--config.optim.learning_rate=1e-3 ...]
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rq_jax import checkpoint, losses, metrics, models
from rq_jax.data import make_dataset
from rq_jax.devices import sharding
from rq_jax.models.discriminator import initialize_actnorm, update_statistics_again
from rq_jax.models.flops import autoencoder_flops
from rq_jax.models.rqvae import last_kernel_gradient
from rq_jax.pretrained import vgg_lpips
from rq_jax.report import grids
from rq_jax.settings.construct import construct
from rq_jax.training import cli
from rq_jax.training.evaluation import Validation
from rq_jax.training.loop import finish
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.settings import LoopSettings, check_sections, memory_remedies, resolve_durations
from rq_jax.training.state import TrainState, apply_gradients, create_state

SECTIONS = (
    "seed", "init_from", "keep_optimizer", "model", "discriminator", "data", "optim", "discriminator_optim", "loss",
    "perceptual", "evaluation", "loop", "mesh",
)  # fmt: skip
# Below this share of the codebook in use, a depth is called collapsed.
COLLAPSED_USAGE = 0.05
NUM_SHOWN = 12
ADVERSARIAL_SCALARS = (
    "generator_loss", "discriminator_loss", "discriminator_gradient_norm", "d_weight", "logits_fake", "logits_real",
)  # fmt: skip
LOSS_DURATIONS = ("perceptual_start", "adversarial_start", "adversarial_warmup")

logger = logging.getLogger(__name__)


class Phase(NamedTuple):
    """The terms that have begun: constants of the step's program, so that a term costs nothing before its start.

    A conditional inside one program would cost more than both its branches on a CPU, where XLA runs them on one core.
    """

    perceptual: bool = False
    adversary: bool = False


class Adversary(NamedTuple):
    """The discriminator and its optimizer."""

    model: Any
    optimizer: Optimizer


class Losses:
    """The weighted sums that stage 1 minimises; the keywords are the config section `loss`.

    Attributes:
      reconstruction: "mse" or "l1".
      commitment_weight, perceptual_weight: of the two terms; 0 leaves the perceptual one out.
      perceptual_start_steps: steps before the perceptual term begins.
      adversarial_weight: of the generator's term beside its adaptive weight, and of the discriminator's loss; 0: no
        adversary.
      discriminator_loss: "hinge" or "vanilla"; generator_loss: "vanilla" or another that `losses` has.
      max_adaptive_weight: limit of the adaptive weight.
      adversarial_start_steps: steps before the adversary begins; until then the discriminator does not learn either.
      adversarial_warmup_steps: over which the generator's term rises linearly to its whole weight; the discriminator
        learns at its own rate from the start.
    """

    def __init__(
        self,
        reconstruction: str = "mse",
        commitment_weight: float = 0.25,
        perceptual_weight: float = 0.0,
        perceptual_start_steps: int = 0,
        adversarial_weight: float = 0.0,
        discriminator_loss: str = "hinge",
        generator_loss: str = "vanilla",
        max_adaptive_weight: float = 1e4,
        adversarial_start_steps: int = 0,
        adversarial_warmup_steps: int = 0,
    ):
        if reconstruction not in ("mse", "l1"):
            raise ValueError(f"loss.reconstruction: '{reconstruction}' is unknown; allowed are 'mse' and 'l1'")
        losses.check_adversarial_losses(discriminator_loss, generator_loss)
        settings = dict(locals())
        for name in (
            "commitment_weight", "perceptual_weight", "perceptual_start_steps", "adversarial_weight",
            "max_adaptive_weight", "adversarial_start_steps", "adversarial_warmup_steps",
        ):  # fmt: skip
            if not 0 <= settings[name] < math.inf:
                raise ValueError(f"loss.{name}: {settings[name]} must be finite and at least 0")
        self.reconstruction, self.commitment_weight = reconstruction, commitment_weight
        self.perceptual_weight, self.perceptual_start_steps = perceptual_weight, perceptual_start_steps
        self.adversarial_weight = adversarial_weight
        self.discriminator_loss, self.generator_loss = discriminator_loss, generator_loss
        self.max_adaptive_weight = max_adaptive_weight
        self.start_steps, self.warmup_steps = adversarial_start_steps, adversarial_warmup_steps

    def check(self, total_steps: int) -> None:
        """Refuse a term that would never begin."""
        for name, weight, start in (
            ("perceptual", self.perceptual_weight, self.perceptual_start_steps),
            ("adversarial", self.adversarial_weight, self.start_steps),
        ):
            if weight and start >= total_steps:
                raise ValueError(
                    f"loss.{name}_start_steps: {start} must be below the {total_steps} steps of the run; "
                    f"lower it, or set loss.{name}_weight=0"
                )

    def of_images(
        self, images: jax.Array, reconstruction: jax.Array, distance: Callable[..., jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The terms that compare images, summed and apart; `distance` (B,) is the perceptual one; None: not yet."""
        total = losses.reconstruction_loss(images, reconstruction, self.reconstruction)
        parts = {"reconstruction_loss": total}
        if self.perceptual_weight:
            term = jnp.float32(0) if distance is None else distance(images, reconstruction).mean()
            parts["perceptual_loss"], total = term, total + self.perceptual_weight * term
        return total, parts

    def phase(self, step: int) -> "Phase":
        """Which terms have begun at a step."""
        return Phase(
            perceptual=self.perceptual_weight > 0 and step >= self.perceptual_start_steps,
            adversary=self.adversarial_weight > 0 and step >= self.start_steps,
        )

    def ramp(self, step: jax.Array) -> jax.Array:
        """Share of the generator's adversarial term at a step from the start on: above 0, then 1."""
        return jnp.clip((step + 1.0 - self.start_steps) / max(self.warmup_steps, 1), 0.0, 1.0)


def make_train_step(
    model: Any,
    optimizer: Optimizer,
    loss: Losses,
    ema_decay: float,
    perceptual: vgg_lpips.Perceptual | None = None,
    adversary: Adversary | None = None,
    mesh: jax.sharding.Mesh | None = None,
):
    """One update of all networks and the codebook: (state, batch, phase, variables of VGG16) -> (state, metrics).

    The phase is static: a run has a program for each of at most three phases. `mesh` is that of the state, where it has
    several devices.

    The autoencoder is run once. What the losses say of the reconstruction is summed up in one gradient with respect to
    that image, which then goes backward through it.
    """

    gather = functools.partial(sharding.gathered, mesh) if mesh is not None else lambda params: params

    def train_step(state: TrainState, batch: dict[str, jax.Array], phase: Phase, perceptual_variables: Any = None):
        images, rngs = batch["image"], state.rng_of_step("restart", "dropout")

        def autoencode(params):
            variables = {"params": gather(params), **state.model_state}
            mutable = ["codebook", "intermediates"]
            output, mutated = model.apply(variables, images, train=True, mutable=mutable, rngs=rngs)
            commitment = losses.commitment_loss(output.latents, output.partial_sums)
            return (output.reconstruction, commitment), (output.codes, mutated)

        (reconstruction, commitment), go_back, (codes, mutated) = jax.vjp(autoencode, state.params, has_aux=True)
        kernel_gradient = functools.partial(last_kernel_gradient, state.params, mutated.pop("intermediates"))

        def image_loss(reconstruction):
            distance = functools.partial(perceptual.distance, perceptual_variables) if phase.perceptual else None
            return loss.of_images(images, reconstruction, distance)

        (total, parts), image_gradient = jax.value_and_grad(image_loss, has_aux=True)(reconstruction)
        total, updated = total + loss.commitment_weight * commitment, {}
        parts["commitment_loss"] = commitment
        if phase.adversary:
            own_gradient, updated, adversarial = adversarial_step(
                adversary, loss, state, images, reconstruction, image_gradient, kernel_gradient, gather
            )
            image_gradient += own_gradient
            total += adversarial.pop("weighted_generator_loss")
            parts |= adversarial
        elif adversary is not None:
            parts |= dict.fromkeys(ADVERSARIAL_SCALARS, jnp.float32(0))
        (grads,) = go_back((image_gradient, jnp.float32(loss.commitment_weight)))
        state, update = apply_gradients(
            state, optimizer, grads, [total, *parts.values()], mutated, ema_decay, **updated
        )
        counts_DK = metrics.code_counts(codes, largest_codebook(model))
        return state, {"loss": total, **parts, **update, "code_counts": counts_DK}

    return train_step


def adversarial_step(
    adversary: Adversary,
    loss: Losses,
    state: TrainState,
    images: jax.Array,
    reconstruction: jax.Array,
    image_gradient: jax.Array,
    kernel_gradient: Callable[[jax.Array], jax.Array],
    gather: Callable[[Any], Any],
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """The discriminator's part of a step (Esser et al., CVPR 2021, section 3.1; as rq-vae-transformer:Trainer.train).

    The original runs the discriminator over the reconstruction twice, for the generator and for its own update, with
    the same weights and the statistics of the same batch: here both gradients come from one pass, and only the running
    statistics are brought forward a second time. Real images are a pass of their own, with statistics of their own.

    Args:
      adversary, loss, state: as they are before the step.
      images, reconstruction: (B, H, W, C).
      image_gradient: of the other image losses with respect to the reconstruction.
      kernel_gradient: takes such a gradient to one of the decoder's last kernel.
      gather: the discriminator's parameters as convolutions use them.

    Returns:
      What to add to the image gradient, fields of the state after the step, and scalars to log.
    """

    def score(params, images, statistics):
        variables = {"params": gather(params), **statistics}
        return adversary.model.apply(variables, images, train=True, mutable=["batch_stats"])

    variables = initialize_actnorm(adversary.model, state.discriminator, reconstruction)
    params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}
    score_fake = functools.partial(score, statistics=statistics)
    fake, go_back, once = jax.vjp(score_fake, params, reconstruction, has_aux=True)
    generator_loss, logit_gradient = jax.value_and_grad(losses.generator_loss)(fake, loss.generator_loss)
    generator_gradient = go_back(logit_gradient)[1]
    fake_loss, logit_gradient = jax.value_and_grad(losses.discriminator_loss_fake)(fake, loss.discriminator_loss)
    fake_grads = go_back(logit_gradient)[0]
    statistics = update_statistics_again(statistics, once)

    def real_loss(params):
        real, after = score(params, images, statistics)
        return losses.discriminator_loss_real(real, loss.discriminator_loss), (real, after)

    (real_loss, (real, statistics)), real_grads = jax.value_and_grad(real_loss, has_aux=True)(params)
    # As rq-vae-transformer:Trainer.train, the discriminator's own loss carries the weight too.
    grads = jax.tree.map(lambda a, b: loss.adversarial_weight * (a + b), fake_grads, real_grads)
    updates, opt_state = adversary.optimizer.transform.update(grads, state.discriminator_opt_state, params)
    d_weight = losses.adaptive_weight(
        kernel_gradient(image_gradient), kernel_gradient(generator_gradient), loss.max_adaptive_weight
    )
    weight = loss.ramp(state.step) * loss.adversarial_weight * d_weight
    discriminator = {"params": optax.apply_updates(params, updates), **statistics}
    updated = {"discriminator": discriminator, "discriminator_opt_state": opt_state}
    scalars = {
        "generator_loss": generator_loss,
        "weighted_generator_loss": weight * generator_loss,
        "discriminator_loss": fake_loss + real_loss,
        "discriminator_gradient_norm": optax.tree.norm(grads),
        "d_weight": d_weight,
        "logits_fake": fake.mean(),
        "logits_real": real.mean(),
    }
    return weight * generator_gradient, updated, scalars


def largest_codebook(model) -> int:
    """K, or the largest K_d."""
    return max(model.codebook_sizes)


def make_summary(model):
    """Logged scalars from the means of the step's metrics; warns of a collapsing codebook."""
    sizes = model.codebook_sizes

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


class Evaluation(NamedTuple):
    """What an evaluation measures beside PSNR and SSIM; the keywords are the config section `evaluation`."""

    use_perceptual: bool = True


def make_validation(model, dataset, mesh, loss: Losses, perceptual: vgg_lpips.Perceptual | None = None) -> Validation:
    """Held-out figures and a picture: originals over reconstructions at depth 1..D.

    PSNR by depth; SSIM and, where there is one, the perceptual distance of the whole depth; the reconstruction loss.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sum_figures(variables, images, mask, perceptual_variables):
        output = model.apply(variables, images)
        by_depth = model.apply(variables, images, method="reconstruct_by_depth")
        pictures_loss = jax.vmap(lambda x, y: losses.reconstruction_loss(x, y, loss.reconstruction))
        figures = {
            "psnr": metrics.psnr(images, by_depth),
            "validation_loss": pictures_loss(images, output.reconstruction),
        }
        if min(model.image_shape) >= metrics.SSIM_WINDOW:
            figures["ssim"] = metrics.ssim(images, output.reconstruction)
        if perceptual is not None:
            shown = jnp.clip(output.reconstruction, -1.0, 1.0)
            figures[f"distance/{perceptual.name}"] = perceptual.distance(perceptual_variables, images, shown)
        sums = {name: jnp.sum(value * mask, axis=-1) for name, value in figures.items()}
        # Only what is shown leaves the device.
        return {**sums, "count": jnp.sum(mask)}, (images[:NUM_SHOWN], by_depth[:, :NUM_SHOWN])

    def measure(state: TrainState, batch: dict[str, np.ndarray]):
        placed = sharding.put_batch(mesh, {"image": batch["image"], "mask": batch["mask"]})
        frozen = perceptual.variables if perceptual else None
        return sum_figures(state.ema_variables, placed["image"], placed["mask"], frozen)

    def report(state: TrainState, sums: dict[str, jax.Array], shown: tuple[jax.Array, jax.Array]):
        means = {name: np.asarray(value) / float(sums["count"]) for name, value in sums.items() if name != "count"}
        psnr_D = means.pop("psnr")
        scalars = {f"psnr/depth{d}": float(value) for d, value in enumerate(psnr_D, start=1)}
        scalars |= {name: float(value) for name, value in means.items()}
        originals, by_depth = jax.tree.map(np.asarray, shown)
        rows = {"original": originals}
        for d, images in enumerate(by_depth, start=1):
            rows[f"depth {d}: {psnr_D[d - 1]:.1f} dB"] = images
        scale = max(1, 96 // originals.shape[1])
        return scalars, {"reconstructions": grids.labelled_grid(rows, scale=scale)}

    return Validation(dataset, measure, report)


def prepare(config: ConfigDict) -> dict[str, Any]:
    """Everything that a run needs except its state; all settings are checked here, before anything compiles."""
    check_sections(config, SECTIONS)
    mesh = construct(sharding.make_mesh, "mesh", config.mesh)
    model = models.create(**config.model)
    sharding.check_batch_size(mesh, config.data.batch_size)
    data = dict(config.data, channels=config.model.in_channels)
    if tuple(np.broadcast_to(data["image_size"], 2)) != model.image_shape:
        raise ValueError(
            f"data.image_size: {data['image_size']} differs from model.image_size {model.image_size}; set them equal"
        )
    if config.keep_optimizer and not config.init_from:
        raise ValueError("keep_optimizer: True needs init_from, a run whose optimizer is kept; set both or neither")
    shard_index, shard_count = sharding.batch_part(mesh)
    shard = dict(shard_index=shard_index, shard_count=shard_count, seed=config.seed)
    dataset = construct(make_dataset, "data", data, split="train", train=True, **shard)
    validation = construct(make_dataset, "data", data, split="validation", train=False, **shard)
    dataset.examples([0])  # raises where no picture can be read

    def with_steps(section: str, *names: str) -> dict[str, Any]:
        return resolve_durations(config[section], section, names, dataset.steps_per_epoch)

    loss = construct(Losses, "loss", with_steps("loss", *LOSS_DURATIONS))
    evaluation = construct(Evaluation, "evaluation", config.evaluation)
    settings = construct(LoopSettings, "loop", with_steps("loop", "total"))
    loss.check(settings.total_steps)
    optim = with_steps("optim", "warmup", "hold")
    optimizer = construct(make_optimizer, "optim", optim, total_steps=settings.total_steps)
    if optimizer.accumulation_steps != 1:
        raise ValueError(
            f"optim.accumulation_steps: {optimizer.accumulation_steps} is for stage 2; the codebook update of stage 1 "
            "needs the whole batch, set it to 1"
        )
    perceptual = None
    if loss.perceptual_weight or evaluation.use_perceptual:
        perceptual = construct(vgg_lpips.load, "perceptual", config.perceptual)
        perceptual = perceptual._replace(variables=jax.device_put(perceptual.variables, sharding.replicated(mesh)))
    return dict(
        mesh=mesh,
        model=model,
        loss=loss,
        dataset=dataset,
        validation=validation,
        settings=settings,
        optimizer=optimizer,
        adversary=(
            make_adversary(config, model, optim, settings.total_steps - loss.start_steps)
            if loss.adversarial_weight
            else None
        ),
        perceptual=perceptual,
        use_perceptual_evaluation=evaluation.use_perceptual,
    )


def make_adversary(config: ConfigDict, model: Any, optim: dict[str, Any], total_steps: int) -> Adversary:
    """The discriminator, and its optimizer: that of the autoencoder but for what `discriminator_optim` sets.

    Its schedule begins when it does, and ends with the run.
    """
    settings = dict(config.discriminator, in_channels=config.model.in_channels)
    images = jax.ShapeDtypeStruct((1, *model.image_shape, model.in_channels), jnp.float32)
    own = {name: value for name, value in config.discriminator_optim.items() if value is not None}
    discriminator = models.create("discriminator", **settings)
    jax.eval_shape(discriminator.init, jax.random.key(0), images)  # raises where the pictures are too small
    optimizer = make_optimizer("discriminator_optim", **{**optim, **own}, total_steps=total_steps)
    return Adversary(discriminator, optimizer)


def state_program(config: ConfigDict, run: dict[str, Any]) -> tuple[Callable[[jax.Array], TrainState], Any]:
    """What draws the state at step 0 from a key, and the state's shapes with the shardings of its arrays."""
    adversary = run["adversary"]

    def init(rng: jax.Array) -> TrainState:
        rng_init, rng_train = jax.random.split(rng)
        variables = models.init_variables(run["model"], rng_init)
        discriminator = None
        if adversary is not None:
            drawn = models.init_variables(adversary.model, jax.random.fold_in(rng_init, 1))
            discriminator = drawn, adversary.optimizer
        use_ema = run["settings"].ema_decay > 0
        return create_state(variables, run["optimizer"], rng_train, use_ema, discriminator)

    return init, sharding.sharded_shapes(run["mesh"], init, jax.random.key(config.seed))


def init_state(config: ConfigDict, run: dict[str, Any]) -> TrainState:
    """The state at step 0, drawn on the devices where it will live."""
    init, shapes = state_program(config, run)
    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(jax.random.key(config.seed))


def train_and_evaluate(config: ConfigDict, workdir: str, strict: bool = False) -> TrainState:
    """Train a tokenizer as `config` says, in `workdir`, going on from its newest checkpoint.

    Returns:
      The last state.

    Raises:
      ValueError, FileNotFoundError: bad settings or data, before anything compiles.
    """
    run = prepare(config)
    begins_elsewhere = bool(config.init_from) and not checkpoint.has_checkpoint(workdir)
    if begins_elsewhere:
        checkpoint.read_config(config.init_from)  # raises where there is no run
    state = init_state(config, run)
    if begins_elsewhere:
        state = checkpoint.start_from(config.init_from, state, config.keep_optimizer)
    perceptual, loss = run["perceptual"], run["loss"]
    train_step = make_train_step(
        run["model"], run["optimizer"], loss, run["settings"].ema_decay, perceptual, run["adversary"], run["mesh"]
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    out_shardings = shardings, sharding.replicated(run["mesh"])
    step = jax.jit(train_step, static_argnums=2, donate_argnums=0, out_shardings=out_shardings)
    frozen = perceptual.variables if loss.perceptual_weight else None
    counted = None

    def step_in_phase(state, batch):
        nonlocal counted  # on the host: reading the step of every state would wait for the device
        counted = int(state.step) if counted is None else counted + 1
        return step(state, batch, loss.phase(counted), frozen)

    state = run(
        workdir=workdir,
        config=config.to_dict(),
        title="stage 1",
        state=state,
        train_step=step_in_phase,
        dataset=run["dataset"],
        mesh=run["mesh"],
        settings=run["settings"],
        summarize=make_summary(run["model"]),
        validation=make_validation(
            run["model"],
            run["validation"],
            run["mesh"],
            loss,
            perceptual if run["use_perceptual_evaluation"] else None,
        ),
        strict=strict,
        flops_per_image=autoencoder_flops(run["model"]),
        dtype=run["model"].dtype,
        remedies=memory_remedies(config, run["mesh"]),
        compiles_at={loss.perceptual_start_steps, loss.start_steps},
    )
    names = ["loss", "validation_loss", *(f"psnr/depth{d + 1}" for d in range(run["model"].code_shape[-1]))]
    names += ["perceptual_loss"] * bool(loss.perceptual_weight)
    names += ["generator_loss", "discriminator_loss", "d_weight"] * bool(loss.adversarial_weight)
    finish(workdir, names)
    return state


if __name__ == "__main__":
    cli.main(train_and_evaluate)
