"""What the recipes of stage 2 share: frozen tokenizer, settings, state and update of a transformer over its codes."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import checkpoint, losses, models, sampling
from rq_jax.data import Splits, bind_data, load_tokenizer
from rq_jax.data.conditions import check_condition, shown_conditions
from rq_jax.devices import sharding
from rq_jax.evaluation import likelihood
from rq_jax.models.flops import transformer_flops
from rq_jax.recipes import codes as frozen_codes
from rq_jax.recipes import latent_cache
from rq_jax.recipes.buckets import Buckets
from rq_jax.recipes.codes import fill_from_tokenizer
from rq_jax.settings import checks
from rq_jax.settings.construct import construct
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.settings import (
    check_sections,
    check_start,
    loop_settings,
    plain,
    recipe_settings,
    resolve_durations,
)
from rq_jax.training.state import TrainState, accumulate_gradients, apply_gradients, create_state

SECTIONS = (
    "seed", "init_from", "keep_optimizer", "model", "data", "optim", "loss", "loop", "mesh", "sample",
    "tokenizer", "tokenizer_preset")  # fmt: skip
NUM_SHOWN = 36


@dataclasses.dataclass(frozen=True, kw_only=True)
class CondLosses:
    """Settings of the condition in the config section `loss`.

    Attributes:
      text_weight: of the cross-entropy of the text, for text-conditional models.
      cond_dropout: share of examples whose condition is left out, for models with `use_null_cond` (guidance).
    """

    text_weight: float = 0.0
    cond_dropout: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is float:
                checks.amount(f"loss.{field.name}", getattr(self, field.name))
        checks.within("loss.cond_dropout", self.cond_dropout, 0, 1, below=True)

    def check_model(self, model: Any) -> None:
        """The model can use these weights.

        Raises:
          ValueError: a text weight without a text, or condition dropout without a null condition or the reverse.
        """
        if self.text_weight and model.cond_length == 1:
            raise ValueError(f"loss.text_weight: {self.text_weight} needs a text-conditional model; set it to 0")
        if (self.cond_dropout > 0) != model.use_null_cond:
            raise ValueError(
                f"loss.cond_dropout: {self.cond_dropout} and model.use_null_cond: {model.use_null_cond} belong "
                "together; set both or neither"
            )

    def drop(self, rng: jax.Array, cond: jax.Array | None, model: Any) -> tuple[jax.Array | None, jax.Array | None]:
        """Conditions with some left out, and which (B, 1) these are; None where none may be."""
        if not self.cond_dropout or cond is None:
            return cond, None
        dropped = jax.random.bernoulli(rng, jnp.float32(self.cond_dropout), (cond.shape[0], 1))
        return jnp.where(dropped, model.cond_vocab_size, cond), dropped

    def text_nats(self, cond: jax.Array, cond_logits: jax.Array, dropped: jax.Array | None) -> jax.Array:
        """Cross-entropy (B, U-1) in nats of the tokens of a text; a caption that was left out teaches nothing."""
        nats_BU = losses.cross_entropy(cond_logits, cond[:, 1:])
        return nats_BU if dropped is None else jnp.where(dropped, 0.0, nats_BU)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage2(abc.ABC):
    """Recipe of stage 2, see `training.loop.Recipe`; a subclass says what a step adds up and an evaluation shows.

    Attributes:
      model: the transformer.
      tokenizer: the frozen tokenizer, as `checkpoint.load_tokenizer` gives it.
      optimizer: of the model's parameters; losses: the objective.
      mesh: devices; ema_decay: of the weight average, 0 for none.
      sample: keywords of `sampling.generate` for the grid of an evaluation.
      shown_cond: conditions (36, U) of that grid; None for an unconditional model.
      text_tokenizer: text tokenizer of a text-conditional model: it is kept in the run directory.
      use_latent_cache: read latents, of a tokenizer with grains codes, that were computed once, from disk.
      buckets: lengths that batches of packed codes are padded to.
      init_from: directory whose weights a fresh run starts from; keep_optimizer: and its optimizer moments.
      seed: of the initial weights and of all random draws.
      config: resolved config, written into the run directory; None: that of the model alone.
      tokenizer_variables: those of `tokenizer` on the mesh; placed there where None.
      figures: of the codes, with the marks to beat; None before `start`.
    """

    model: nn.Module
    tokenizer: checkpoint.LoadedModel
    optimizer: Optimizer
    losses: Any
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    ema_decay: float = 0.0
    sample: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown_cond: np.ndarray | None = None
    text_tokenizer: Any = None
    use_latent_cache: bool = False
    buckets: Buckets = Buckets()
    init_from: str | None = None
    keep_optimizer: bool = False
    seed: int = 0
    config: Mapping[str, Any] | None = None
    tokenizer_variables: Any = None
    figures: frozen_codes.CodeFigures | None = None

    losses_class: ClassVar[type]
    has_grains: ClassVar[bool]  # of the tokenizers that it takes
    # Of each metric with several values: their name, and the first number.
    parts: ClassVar[Mapping[str, tuple[str, int]]]
    title: ClassVar[str] = "stage 2"
    accumulates: ClassVar[bool] = True
    criterion: ClassVar[str] = "validation_loss"
    curves: ClassVar[Sequence[str]] = ("loss", "validation_loss")

    def __post_init__(self):
        checks.within("loop.ema_decay", self.ema_decay, 0, 1, below=True, fix="0 keeps no average")
        check_start(self.init_from, self.keep_optimizer)
        self.losses.check_model(self.model)
        sampling.check_guidance(self.model, self.sample.get("guidance"))
        if self.config is None:
            config = {"model": models.settings_of(self.model), "sample": dict(self.sample)}
            object.__setattr__(self, "config", config)
        if self.tokenizer_variables is None:
            placed = jax.device_put(self.tokenizer.variables, sharding.replicated(self.mesh))
            object.__setattr__(self, "tokenizer_variables", placed)

    # --- from a config ---

    @classmethod
    def resolve(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config as nested dicts, with its sections checked and the tokenizer's settings filled in.

        Raises:
          ValueError, FileNotFoundError: an unknown or missing section, no tokenizer, or settings that differ from its.
        """
        config = {"init_from": None, "keep_optimizer": False, **plain(config)}
        check_sections(config, SECTIONS)
        if not config["tokenizer"]:
            raise ValueError(
                "config.tokenizer: unset; give --config.tokenizer=<workdir of a stage-1 run>, this preset expects one "
                f"of configs/{'dqvae' if cls.has_grains else 'rqvae'}.py:{config['tokenizer_preset']}"
            )
        return fill_from_tokenizer(config, checkpoint.read_tokenizer_config(config["tokenizer"]), cls.has_grains)

    @staticmethod
    def data_settings(config: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `data.open_splits`."""
        return dict(config["data"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], mesh: jax.sharding.Mesh, data: Splits) -> "Stage2":
        """The recipe of a config from `resolve`.

        Raises:
          ValueError, FileNotFoundError: settings that are not allowed, or that do not fit the data; before anything
            compiles.
        """
        model = models.create(**config["model"])
        terms = construct(cls.losses_class, "loss", config["loss"])
        sample = dict(config["sample"])
        cls.check_sample(sample)
        check_condition(model, data.train, config["data"])
        steps_per_epoch, loop = data.train.steps_per_epoch, recipe_settings(config["loop"])
        total_steps = loop_settings(config["loop"], steps_per_epoch).total_steps
        optim = resolve_durations(config["optim"], "optim", ("warmup", "hold"), steps_per_epoch)
        optimizer = construct(make_optimizer, "optim", optim, total_steps=total_steps)
        sharding.check_batch_size(mesh, data.train.batch_size, optimizer.accumulation_steps)
        if loop.use_latent_cache:
            latent_cache.check(config["data"])
        text = config["data"]["text_tokenizer"] if config["data"]["text_key"] else None
        return cls(
            model, checkpoint.load_tokenizer(config["tokenizer"]), optimizer, terms, mesh,
            ema_decay=loop.ema_decay, sample=sample,
            shown_cond=shown_conditions(model, data.train, NUM_SHOWN),
            text_tokenizer=load_tokenizer(text, config["data"]["text_length"]) if text else None,
            use_latent_cache=loop.use_latent_cache, buckets=Buckets(loop.buckets, loop.bucket_window),
            init_from=config["init_from"], keep_optimizer=config["keep_optimizer"], seed=config["seed"], config=config,
        )  # fmt: skip

    @classmethod
    def check_sample(cls, sample: Mapping[str, Any]) -> None:
        """The config section `sample`, but for its guidance.

        Raises:
          ValueError: an unknown setting, or a value out of range.
        """
        # None stands for "no filter" in a config, where a missing key would be an error.
        check_filter = functools.partial(sampling.check_filter, top_k=None, top_p=None)
        construct(check_filter, "sample", {name: value for name, value in sample.items() if name != "guidance"})

    # --- state ---

    def start(self, workdir: str, data: Splits, is_fresh: bool) -> tuple["Stage2", Splits]:
        """Bind the tokenizer to the run, count its codes on the training set once, and fill the cache.

        Returns:
          The recipe with the marks to beat, class names and class counts; the data, cached where that was asked for.

        Raises:
          ValueError: the run was started with another tokenizer or other data.
        """
        bind_data(workdir, data, self.config.get("data") or {}, is_fresh)
        mark = checkpoint.bind_tokenizer(workdir, self.tokenizer)
        if self.text_tokenizer is not None:  # sampling needs it, and the run directory has to suffice
            self.text_tokenizer.save(Path(workdir) / checkpoint.TEXT_TOKENIZER)
        num_steps = self.optimizer.accumulation_steps, frozen_codes.num_validation_steps(self.config, self.optimizer)
        counter = frozen_codes.CodeCounter(self.tokenizer.model, self.tokenizer_variables, self.mesh, *num_steps)
        temperature = self.soft_temperature
        figures = frozen_codes.kept_figures(Path(workdir), mark, counter, data, temperature)
        frozen_codes.report_usage(figures.counts_DK, self.model.codebook_sizes, self.model.use_shared_codebook)
        if figures.spread_D is not None:
            frozen_codes.report_soft_codes(figures.spread_D, self.model.codebook_sizes[0], temperature)
        if self.use_latent_cache:
            cached = self.tokenizer.model, self.tokenizer_variables, data.ordered, self.config["data"]
            data = data._replace(train=latent_cache.open_cache(*cached, Path(workdir), self.seed))
        config = {**self.config, "class_names": data.ordered.class_names, "class_counts": figures.class_counts}
        bound = dataclasses.replace(self, config=config, figures=figures)
        return bound if is_fresh else dataclasses.replace(bound, init_from=None, keep_optimizer=False), data

    @property
    def soft_temperature(self) -> float | None:
        """Temperature of the soft codes; None where a step has none."""
        return None

    def _draw(self, rng: jax.Array, codebook: Any) -> TrainState:
        rng_init, rng_train = jax.random.split(rng)
        variables = models.init_variables(self.model, rng_init)
        if self.model.uses_codebook:
            variables["codebook"] = {"codebook_KE": codebook}
        return create_state(variables, self.optimizer, rng_train, self.ema_decay > 0)

    @property
    def _codebook(self) -> Any:
        return self.tokenizer_variables["codebook"]["codebook_KE"]

    def abstract_state(self) -> TrainState:
        """Shapes of the state with their shardings; nothing is computed."""
        return sharding.sharded_shapes(self.mesh, self._draw, jax.random.key(self.seed), self._codebook)

    @functools.cached_property
    def shardings(self) -> TrainState:
        """Where every array of the state lies."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state())

    def init(self, rng: jax.Array) -> TrainState:
        """The state before the first step, drawn on the devices where it lives; from `init_from` where that is set.

        The codebook is the tokenizer's in either case.

        Raises:
          FileNotFoundError, ValueError: as `checkpoint.start_from`.
        """
        state = self._jitted_draw(rng, self._codebook)
        if not self.init_from:
            return state
        started = checkpoint.start_from(self.init_from, state, self.keep_optimizer)
        return started.replace(model_state=state.model_state)

    @functools.cached_property
    def _jitted_draw(self) -> Callable[..., TrainState]:
        return jax.jit(self._draw, out_shardings=self.shardings)

    # --- one update ---

    def phase(self, step: int) -> None:
        """Every step has the same program."""
        return None

    @property
    def frozen(self) -> Any:
        """Variables that `update` reads and does not train: the tokenizer's."""
        return self.tokenizer_variables

    def step(self, state: TrainState, batch: Mapping[str, jax.Array], phase: None = None):
        """One jitted update, which donates the state."""
        return self._step(state, batch, self.frozen)

    @functools.cached_property
    def _step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        out_shardings = (self.shardings, sharding.replicated(self.mesh))
        return jax.jit(self.update, donate_argnums=0, out_shardings=out_shardings)

    def update(
        self, state: TrainState, batch: Mapping[str, jax.Array], frozen: Any, phase: None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update of the transformer.

        Args:
          state: see `TrainState`.
          batch: "image" (B, H, W, C), or of a cache "latents" (B, H', W', C'), or "codes" (B, h, w, D) and "grains"
            (B, u, v), or "packed", their tokens; "cond" (B, U) where the model takes a condition.
          frozen: the tokenizer's variables.

        Returns:
          The next state and the step's metrics: scalars, but those of which `summarize` names the parts.
        """
        rngs = state.rng_of_step("codes", "dropout", "cond")
        with sharding.activations(self.mesh):
            rows, compute = self._prepare(batch, rngs, state.model_state, frozen)
            means, grads = accumulate_gradients(compute, state.params, rows, self.optimizer.accumulation_steps, rngs)
            means, grads = sharding.mean_over_parts(self.mesh, (means, grads), self._part_axes)
            state, update = apply_gradients(
                state, self.optimizer, grads, means["loss"], state.model_state, self.ema_decay
            )
        return state, {**means, **update}

    @abc.abstractmethod
    def _prepare(
        self, batch: Mapping[str, jax.Array], rngs: Mapping[str, jax.Array], model_state: Any, frozen: Any
    ) -> tuple[Any, Callable[..., Any]]:
        """What a step does before its micro-batches.

        Returns:
          Rows (B, ...) to split, and (params, some of the rows, rngs) -> losses and gradients, see
          `accumulate_gradients`.
        """

    def _differentiate(self, objective: Callable[[Any, Any], Any], params: Any, rows: Any) -> tuple[Any, Any]:
        """Losses and gradients of some rows, by part where devices add up their own.

        Args:
          objective: (params, rows) -> the loss and a dictionary of its terms.
        """
        differentiate = functools.partial(jax.value_and_grad(objective, has_aux=True), params)
        (total, parts), grads = sharding.over_parts(self.mesh, differentiate, rows, self._part_axes)
        return {"loss": total, **parts}, grads

    @property
    def _devices_of_an_image(self) -> int:
        return self.mesh.size // sharding.num_parts(self.mesh)

    @property
    def _part_axes(self) -> tuple[str, ...]:
        """Mesh axes whose devices add up gradients of their own over micro-batches."""
        if self.optimizer.accumulation_steps == 1 or sharding.num_parts(self.mesh) == 1:
            return ()
        return ("data",) if self.optimizer.use_sharded_gradients else sharding.BATCH_AXES

    def summarize(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Logged scalars from the means of the step's metrics."""
        scalars = {name: float(value) for name, value in means.items() if name not in self.parts}
        for metric, (part, first) in self.parts.items():
            scalars |= {f"{metric}/{part}{i}": float(x) for i, x in enumerate(means[metric], start=first)}
        return scalars

    # --- evaluation ---

    @functools.cached_property
    def _measure(self) -> Callable[..., Any]:
        num_steps = frozen_codes.num_validation_steps(self.config, self.optimizer)
        return likelihood.make_measure(self.model, self.tokenizer.model, self.mesh, num_steps)

    def evaluate(self, state: TrainState, batch: Mapping[str, np.ndarray]) -> tuple[Any, None]:
        """Sums over a batch of the nats of its nearest codes, see `likelihood.make_measure`."""
        return self._measure(state.ema_variables, self.tokenizer_variables, batch)

    def _generate(self, state: TrainState) -> tuple[Any, np.ndarray]:
        """Codes and images (36, H, W, C) of the grid of an evaluation."""
        codes = sampling.generate(
            self.model, state.ema_variables, jax.random.key(self.seed), NUM_SHOWN, self.shown_cond, **self.sample
        )
        return codes, np.asarray(self._decode(self.tokenizer_variables, codes))

    @functools.cached_property
    def _decode(self) -> Callable[..., jax.Array]:
        decode = functools.partial(self.tokenizer.model.apply, method="decode_codes")
        return jax.jit(decode, out_shardings=sharding.replicated(self.mesh))

    # --- the log ---

    @property
    def flops_per_image(self) -> float:
        """Of the model, forward and backward; with grains of the mean number of tokens, once it is known.

        Pads are no work of the model: a step that spends less time on them has a higher utilization.
        """
        tokens = None if self.figures is None else self.figures.tokens_per_image
        return sum(transformer_flops(self.model, train=True, tokens=None if tokens is None else round(tokens)).values())
