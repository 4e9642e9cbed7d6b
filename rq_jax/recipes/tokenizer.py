"""Stage 1: a tokenizer, with perceptual and adversarial losses (RQ-VAE, section 3.1; DQ-VAE, section 3.2).

Where tokenizers differ, their models and outputs tell: what has a gradient, what counts how often, whether there are
grains, a router that trains, thresholds to measure.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from rq_jax import checkpoint, models
from rq_jax.data import Splits, bind_data
from rq_jax.data.entropy import Calibration
from rq_jax.devices import sharding
from rq_jax.evaluation.grains import describe_grains
from rq_jax.evaluation.tokenizer import Evaluation, make_measure, picture
from rq_jax.models.coder import last_kernel_gradient
from rq_jax.models.flops import autoencoder_flops
from rq_jax.pretrained import vgg_lpips
from rq_jax.recipes import thresholds, usage
from rq_jax.recipes.adversary import Adversary
from rq_jax.recipes.terms import Losses, Phase
from rq_jax.settings import checks
from rq_jax.settings.construct import construct
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.settings import check_sections, check_start, loop_settings, plain, resolve_durations
from rq_jax.training.state import TrainState, apply_gradients, create_state

SECTIONS = (
    "seed", "init_from", "keep_optimizer", "model", "discriminator", "data", "optim", "discriminator_optim", "loss",
    "perceptual", "evaluation", "loop", "mesh",
)  # fmt: skip
LOSS_DURATIONS = ("perceptual_start", "adversarial_start", "adversarial_warmup")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Recipe of stage 1, see `training.loop.Recipe`.

    Attributes:
      model: the tokenizer.
      optimizer: of its parameters.
      losses: the objective.
      adversary: discriminator and its optimizer; None: no adversarial term.
      perceptual: network of the perceptual loss; None: no such term.
      judge: network of the perceptual distance of an evaluation; None: not measured.
      best_by: which of its figures decides, see `Evaluation`.
      mesh: devices.
      ema_decay: of the weight average, 0 for none.
      init_from: directory whose weights a fresh run starts from; keep_optimizer: and its optimizer moments.
      seed: of the initial weights and of all random draws.
      config: resolved config, written into the run directory; None: that of the model alone.
      calibration: what the thresholds of the model's router are measured on by `start`; None: they are its own.
    """

    model: nn.Module
    optimizer: Optimizer
    losses: Losses = Losses()
    adversary: Adversary | None = None
    perceptual: vgg_lpips.Perceptual | None = None
    judge: vgg_lpips.Perceptual | None = None
    best_by: str = "auto"
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    ema_decay: float = 0.0
    init_from: str | None = None
    keep_optimizer: bool = False
    seed: int = 0
    config: Mapping[str, Any] | None = None
    calibration: Calibration | None = None

    title: ClassVar[str] = "stage 1"
    accumulates: ClassVar[bool] = False

    def __post_init__(self):
        checks.within("loop.ema_decay", self.ema_decay, 0, 1, below=True, fix="0 keeps no average")
        if self.optimizer.accumulation_steps != 1:
            raise ValueError(
                f"optim.accumulation_steps: {self.optimizer.accumulation_steps} is for stage 2; the codebook update of "
                "stage 1 needs the whole batch, set it to 1"
            )
        check_start(self.init_from, self.keep_optimizer)
        self.losses.check_model(self.model)
        _ = self.criterion  # refused before anything compiles
        if self.config is None:
            object.__setattr__(self, "config", {"model": models.settings_of(self.model)})

    # --- from a config ---

    @classmethod
    def resolve(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config as nested dicts, with its sections checked.

        Raises:
          ValueError: an unknown section, a missing one, images of another size than the model's, or thresholds that
            its router does not read.
        """
        config = plain(config)
        check_sections(config, (*SECTIONS, *{"thresholds"} & config.keys()))
        model = thresholds.provisional_model(config["model"])
        thresholds.check(config, model)
        size = config["data"]["image_size"]
        if tuple(np.broadcast_to(size, 2)) != model.image_shape:
            raise ValueError(
                f"data.image_size: {size} differs from model.image_size {model.image_size}; set them equal"
            )
        return config

    @staticmethod
    def data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `data.open_splits`."""
        return {**config["data"], "channels": config["model"]["in_channels"]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], mesh: jax.sharding.Mesh, data: Splits) -> "Tokenizer":
        """The recipe of a config from `resolve`.

        Raises:
          ValueError, FileNotFoundError: settings that are not allowed, or weights of the perceptual loss that are not
            there; before anything compiles.
        """
        model, calibration = thresholds.provisional_model(config["model"]), None
        if model.entropy_settings and config["model"].get("thresholds") is None:
            calibration = thresholds.calibration_of(config, model, data)
            if given := config.get("thresholds"):
                _ = thresholds.of_file(given, model, calibration)  # raises where it is of other data
        sharding.check_batch_size(mesh, data.train.batch_size)
        with_steps = functools.partial(resolve_durations, steps_per_epoch=data.train.steps_per_epoch)
        terms = construct(Losses, "loss", with_steps(config["loss"], "loss", LOSS_DURATIONS))
        total_steps = loop_settings(config["loop"], data.train.steps_per_epoch).total_steps
        terms.check_starts(total_steps)
        optim = with_steps(config["optim"], "optim", ("warmup", "hold"))
        optimizer = construct(make_optimizer, "optim", optim, total_steps=total_steps)
        evaluation = construct(Evaluation, "evaluation", config["evaluation"])
        perceptual = None
        if terms.perceptual_weight or evaluation.use_perceptual:
            perceptual = construct(vgg_lpips.load, "perceptual", config["perceptual"])
            placed = jax.device_put(perceptual.variables, sharding.replicated(mesh))
            perceptual = perceptual._replace(variables=placed)
        adversary = None
        if terms.adversarial_weight:
            left = total_steps - terms.adversarial_start_steps
            adversary = Adversary.from_config(config, model, optim, left, terms)
        return cls(
            model, optimizer, terms, adversary,
            perceptual=perceptual if terms.perceptual_weight else None,
            judge=perceptual if evaluation.use_perceptual else None, best_by=evaluation.best_by,
            mesh=mesh, ema_decay=config["loop"]["ema_decay"], init_from=config["init_from"],
            keep_optimizer=config["keep_optimizer"], seed=config["seed"], config=config, calibration=calibration,
        )  # fmt: skip

    # --- state ---

    def start(self, workdir: str, data: Splits, is_fresh: bool) -> tuple["Tokenizer", Splits]:
        """The recipe of a run, bound to its data: with thresholds, and only a fresh one starts from `init_from`."""
        bind_data(workdir, data, self.config.get("data") or {}, is_fresh)
        recipe = self._with_thresholds(workdir, data, is_fresh)
        if self.init_from and not is_fresh:
            return dataclasses.replace(recipe, init_from=None, keep_optimizer=False), data
        return recipe, data  # itself where nothing is new, with the programs that it has compiled

    def _with_thresholds(self, workdir: str, data: Splits, is_fresh: bool) -> "Tokenizer":
        if not self.model.entropy_settings:
            return self
        given, recipe = self.config.get("thresholds"), self
        if self.calibration is not None:
            values = thresholds.of_run(workdir, given, self.model, self.calibration, data)
            config = {**self.config, "model": {**self.config["model"], "thresholds": values}}
            model = self.model.clone(thresholds=values)
            recipe = dataclasses.replace(self, model=model, config=config, calibration=None)
        thresholds.bind(workdir, given, recipe.model.thresholds, is_fresh)
        return recipe

    def _draw(self, rng: jax.Array) -> TrainState:
        rng_init, rng_train = jax.random.split(rng)
        variables, discriminator = models.init_variables(self.model, rng_init), None
        if self.adversary is not None:
            drawn = models.init_variables(self.adversary.model, jax.random.fold_in(rng_init, 1))
            discriminator = drawn, self.adversary.optimizer
        return create_state(variables, self.optimizer, rng_train, self.ema_decay > 0, discriminator)

    def abstract_state(self) -> TrainState:
        """Shapes of the state with their shardings; nothing is computed."""
        return sharding.sharded_shapes(self.mesh, self._draw, jax.random.key(self.seed))

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where every array of the state lies."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state())

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first step, drawn on the devices where it lives; from `init_from` where that is set.

        Raises:
          ValueError: thresholds that are not measured yet, or as `checkpoint.start_from`.
        """
        if self.calibration is not None:
            raise ValueError("model.thresholds: not measured yet; `start` does that, or set them")
        state = self._jitted_draw(rng)
        return checkpoint.start_from(self.init_from, state, self.keep_optimizer) if self.init_from else state

    @functools.cached_property
    def _jitted_draw(self) -> Callable[..., TrainState]:
        return jax.jit(self._draw, out_shardings=self.shardings)

    # --- one update ---

    def phase(self, step: int) -> Phase:
        """The terms that have begun at a step: those that its program is compiled for."""
        return self.losses.phase(step)

    @property
    def frozen(self) -> Any:
        """Variables that `update` reads and does not train."""
        return None if self.perceptual is None else self.perceptual.variables

    def step(self, state: TrainState, batch: Mapping[str, jax.Array], phase: Phase | None = None):
        """One jitted update, which donates the state; the phase of `state` where none is given (waits for its step)."""
        phase = self.phase(int(state.progress)) if phase is None else phase
        return self._step(state, batch, self.frozen, phase)

    @functools.cached_property
    def _step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        out_shardings = (self.shardings, sharding.replicated(self.mesh))
        return jax.jit(self.update, static_argnums=3, donate_argnums=0, out_shardings=out_shardings)

    def update(
        self, state: TrainState, batch: Mapping[str, jax.Array], frozen: Any, phase: Phase
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update of all networks and the codebook.

        The autoencoder runs forward once. The gradient of the whole objective with respect to its *output* is summed up
        first (a handful of images and latents), and goes backward through the networks once: so the adversary can weigh
        its own gradient against that of the other terms without a second backward pass.

        Args:
          state: see `TrainState`.
          batch: "image" (B, H, W, C) in [-1, 1].
          frozen: variables of the perceptual network.
          phase: static.

        Returns:
          The next state and the step's metrics, scalars and the counts of `usage.count`.
        """
        images = sharding.split_batch(self.mesh, batch["image"], sharding.AXES)
        rngs = state.rng_of_step("restart", "dropout", "gate")

        def autoencode(params: Any) -> tuple[dict[str, jax.Array], tuple[Any, Any]]:
            variables = {"params": sharding.gathered(self.mesh, params), **state.model_state}
            mutable = ["codebook", "intermediates"]
            output, mutated = self.model.apply(variables, images, train=True, mutable=mutable, rngs=rngs)
            # Of what the terms read; codes are integers, and the terms stop the gradient of partial sums.
            return {name: getattr(output, name) for name in output.differentiable}, (output, mutated)

        outputs, pull_back, (output, mutated) = jax.vjp(autoencode, state.params, has_aux=True)
        distance = functools.partial(self.perceptual.distance, frozen) if phase.perceptual else None

        def objective(outputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            terms = self.losses.terms(images, output._replace(**outputs), distance, self.model.budget_targets)
            total = sum(weight * value for weight, value in terms.values())
            return total, {name: value for name, (_, value) in terms.items()}

        (total, parts), gradients = jax.value_and_grad(objective, has_aux=True)(outputs)
        updated: dict[str, Any] = {}
        if self.adversary is not None:
            adversarial = self.adversary.idle()
            if phase.adversary:
                kernel_gradient = functools.partial(last_kernel_gradient, state.params, mutated["intermediates"])
                adversarial = self.adversary.update(
                    state, images, output.reconstruction, gradients["reconstruction"], kernel_gradient,
                    functools.partial(sharding.gathered, self.mesh),
                )  # fmt: skip
                gradients["reconstruction"] += adversarial.image_gradient
                total += adversarial.loss
            updated = adversarial.fields
            parts |= adversarial.metrics
        (grads,) = pull_back(gradients)
        with sharding.activations(self.mesh):
            state, update = apply_gradients(
                state, self.optimizer, grads, [total, *parts.values()], {"codebook": mutated["codebook"]},
                self.ema_decay, **updated,
            )  # fmt: skip
        return state, {"loss": total, **parts, **update, **usage.count(self.model, output)}

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """Logged scalars from the means of the step's metrics; warns of a collapsing codebook."""
        window = (self.config or {}).get("loop", {}).get("log_every_steps", 1)  # the counts are means of its steps
        scalars = {name: float(value) for name, value in means.items() if not usage.is_count(name)}
        return scalars | usage.summarize(self.model, means, window)

    # --- evaluation and log ---

    @property
    def criterion(self) -> str:
        """The figure whose lowest value marks the best weights."""
        is_sharpened = self.losses.perceptual_weight > 0 or self.adversary is not None
        return Evaluation(self.judge is not None, self.best_by).criterion(is_sharpened, self.judge)

    @functools.cached_property
    def _measure(self) -> Callable[..., Any]:
        return make_measure(self.model, self.mesh, reconstruction=self.losses.reconstruction, perceptual=self.judge)

    def evaluate(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Sums of PSNR by depth, SSIM, reconstruction loss and perceptual distance over a batch; images to show."""
        return self._measure(state.ema_variables, batch)

    def report(self, state: TrainState, sums: Any, shown: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Means over the held-out images, and a grid: originals over reconstructions from 1, 2, ..., D codes."""
        sums, shown = dict(sums), jax.tree.map(np.asarray, shown)
        count, grains = float(sums.pop("count")), sums.pop("grains", None)
        psnr_D = np.asarray(sums.pop("psnr")) / count
        scalars = {f"psnr/depth{d}": float(value) for d, value in enumerate(psnr_D, start=1)}
        scalars |= {name: float(np.asarray(value) / count) for name, value in sums.items()}
        if grains is not None:
            scalars |= {f"validation_{name}": value for name, value in describe_grains(grains).items()}
        return scalars, {"reconstructions": picture(shown, psnr_D, self.model.num_grains)}

    @functools.cached_property
    def flops_per_image(self) -> float:
        """Of the model, forward and backward."""
        return autoencoder_flops(self.model)

    @property
    def curves(self) -> Sequence[str]:
        """Metrics to plot at the end of a run."""
        names = ["loss", "validation_loss", *(f"psnr/depth{d + 1}" for d in range(self.model.code_shape[-1]))]
        names += ["perceptual_loss"] * (self.losses.perceptual_weight > 0)
        return names + ["generator_loss", "discriminator_loss", "d_weight"] * (self.adversary is not None)
