"""Stage 2: train an RQ-Transformer over the codes of a frozen tokenizer.

python train_transformer.py --config=configs/rqtransformer.py:demo --workdir=runs/rqt --config.tokenizer=runs/rqvae
"""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rq_jax import checkpoint, losses, metrics, models, quantize, sampling
from rq_jax.data import CacheDataset, load_tokenizer, make_dataset, read_meta, write_cache
from rq_jax.devices import sharding
from rq_jax.models.flops import transformer_flops
from rq_jax.report import grids
from rq_jax.settings.construct import construct
from rq_jax.training import cli
from rq_jax.training.evaluation import Validation
from rq_jax.training.loop import finish, locked
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.settings import LoopSettings, check_sections, memory_remedies, resolve_durations
from rq_jax.training.state import TrainState, accumulate_gradients, apply_gradients, create_state

SECTIONS = (
    "seed",
    "model",
    "data",
    "optim",
    "loss",
    "loop",
    "mesh",
    "sample",
    "tokenizer",
    "tokenizer_preset",
)
# Training pictures behind the unigram mark and the code usage, where they are not all in the latent cache.
NUM_COUNTED = 20_000
NUM_SHOWN = 36
NOISE_SPREAD = 0.2  # of the codebook, above which soft codes of depth 1 say little
TEXT_TOKENIZER = "text_tokenizer.json"  # in the run directory

logger = logging.getLogger(__name__)


class Losses:
    """What stage 2 minimises, a chunk of positions at a time; the keywords are the config section `loss`.

    Attributes:
      use_soft_labels: targets are the tokenizer's soft codes, else its codes (paper, section 3.3).
      use_stochastic_codes: codes are drawn from the soft codes, else the nearest ones.
      temperature: of the soft codes.
      image_weight, text_weight: of the two cross-entropies; text is for text-conditional models.
      cond_dropout: share of examples whose condition is left out, for models with `use_null_cond` (guidance).
    """

    def __init__(
        self,
        use_soft_labels: bool = True,
        use_stochastic_codes: bool = True,
        temperature: float = 0.5,
        image_weight: float = 1.0,
        text_weight: float = 0.0,
        cond_dropout: float = 0.0,
    ):
        if not temperature > 0:
            raise ValueError(f"loss.temperature: {temperature} must be above 0")
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"loss.cond_dropout: {cond_dropout} is outside [0, 1)")
        self.use_soft_labels, self.use_stochastic_codes = use_soft_labels, use_stochastic_codes
        self.temperature, self.cond_dropout = temperature, cond_dropout
        self.image_weight, self.text_weight = image_weight, text_weight

    def check(self, model: Any) -> None:
        """Refuse weights that the model cannot use."""
        if self.text_weight and model.cond_length == 1:
            raise ValueError(f"loss.text_weight: {self.text_weight} needs a text-conditional model; set it to 0")
        if (self.cond_dropout > 0) != model.use_null_cond:
            raise ValueError(
                f"loss.cond_dropout: {self.cond_dropout} and model.use_null_cond: {model.use_null_cond} belong "
                "together; set both or neither"
            )

    def draw(self, latents: jax.Array, model: Any, codebook: quantize.Codebook, rng: jax.Array):
        """Codes (B, h, w, D) and the residuals behind them, from latents on the latent grid."""
        h, w, D = model.code_shape
        vectors = quantize.fold_patches(latents, (h, w))
        rng = rng if self.use_stochastic_codes else None
        return quantize.draw_codes(vectors, codebook, D, self.temperature, rng)

    def by_depth(self, model, variables, hidden, codes, residuals, codebook) -> jax.Array:
        """Cross-entropy in nats of each picture at each depth (B, D), mean over positions."""
        classify = functools.partial(model.apply, variables, method="classify")
        soft = (residuals, lambda chunk: quantize.soft_labels(chunk, codebook, self.temperature))
        targets = soft if self.use_soft_labels else ()
        return losses.cross_entropy_by_depth(classify, max(model.codebook_sizes), hidden, codes, *targets)


def make_train_step(model, tokenizer, optimizer: Optimizer, loss: Losses, ema_decay: float):
    """One update of the transformer: (state, batch, tokenizer variables) -> (state, metrics).

    The batch has "image" or "latents", and "cond" where the model takes a condition.
    """

    def loss_and_grads(params, batch, rngs, model_state, tokenizer_variables):
        codebook = _codebook(tokenizer_variables)
        latents = batch["latents"] if "latents" in batch else encode(tokenizer, tokenizer_variables, batch["image"])
        codes, residuals = jax.lax.stop_gradient(loss.draw(latents, model, codebook, rngs["codes"]))
        cond = batch.get("cond")
        if loss.cond_dropout:
            dropped = jax.random.bernoulli(rngs["cond"], loss.cond_dropout, (cond.shape[0], 1))
            cond = jnp.where(dropped, model.cond_vocab_size, cond)

        def loss_fn(params):
            variables = {"params": params, **model_state}
            rng_spatial, rng_depth = jax.random.split(rngs["dropout"])
            apply = functools.partial(model.apply, variables, train=True)
            context, cond_logits, _ = apply(codes, cond, rngs={"dropout": rng_spatial}, method="spatial")
            hidden, _ = apply(context, codes, rngs={"dropout": rng_depth}, method="depth")
            loss_D = loss.by_depth(model, variables, hidden, codes, residuals, codebook).mean(0)
            total, parts = loss.image_weight * loss_D.mean(), {"code_loss": loss_D}
            if loss.text_weight:
                text_loss_BU = losses.cross_entropy(cond_logits, batch["cond"][:, 1:])
                if loss.cond_dropout:  # a caption that was left out teaches nothing
                    text_loss_BU = jnp.where(dropped, 0.0, text_loss_BU) / jnp.maximum(jnp.mean(~dropped), 1e-9)
                parts["text_loss"] = text_loss_BU.mean()
                total += loss.text_weight * parts["text_loss"]
            return total, parts

        (total, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return {"loss": total, **parts}, grads

    def train_step(state: TrainState, batch: dict[str, jax.Array], tokenizer_variables: Any):
        rngs = state.rng_of_step("codes", "dropout", "cond")
        compute = functools.partial(
            loss_and_grads, model_state=state.model_state, tokenizer_variables=tokenizer_variables
        )
        means, grads = accumulate_gradients(compute, state.params, batch, optimizer.accumulation_steps, rngs)
        state, update = apply_gradients(state, optimizer, grads, means["loss"], state.model_state, ema_decay)
        return state, {**means, **update}

    return train_step


def encode(tokenizer, variables: Any, images: jax.Array) -> jax.Array:
    """Latents of images, without a gradient."""
    return jax.lax.stop_gradient(tokenizer.apply(variables, images, method="encode"))


def summarize(means: dict[str, np.ndarray]) -> dict[str, float]:
    """Logged scalars from the means of the step's metrics."""
    by_depth = {f"code_loss/depth{d}": float(x) for d, x in enumerate(means.pop("code_loss"), start=1)}
    return {**{name: float(value) for name, value in means.items()}, **by_depth}


def make_validation(
    run: dict[str, Any], tokenizer_variables: Any, unigram_D: np.ndarray, config: ConfigDict
) -> Validation:
    """Held-out loss of the nearest codes in nats per depth and bits per image, and a grid of samples."""
    model, tokenizer, mesh = run["model"], run["tokenizer"].model, run["mesh"]
    (h, w, D) = model.code_shape

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sum_nats(variables, tokenizer_variables, batch):
        codes = tokenizer.apply(tokenizer_variables, batch["image"], method="encode_to_codes")
        nats_BD = losses.code_nats(model, variables, codes, batch.get("cond"))
        return {"nats": jnp.sum(nats_BD * batch["mask"][:, None], axis=0), "count": batch["mask"].sum()}

    decode = functools.partial(tokenizer.apply, method="decode_codes")
    decode = jax.jit(decode, out_shardings=sharding.replicated(mesh))

    def measure(state: TrainState, batch: dict[str, np.ndarray]):
        placed = sharding.put_batch(mesh, with_cond(batch, config, ("image", "mask")))
        return sum_nats(state.ema_variables, tokenizer_variables, placed), None

    def report(state: TrainState, sums: dict[str, jax.Array], shown: None):
        nats_D = np.asarray(sums["nats"]) / float(sums["count"])
        scalars = {"validation_loss": float(nats_D.mean())}
        scalars["bits_per_image"] = float(nats_D.sum() * h * w / math.log(2))
        for d in range(D):
            scalars[f"validation_nats/depth{d + 1}"] = float(nats_D[d])
            scalars[f"unigram_nats/depth{d + 1}"] = float(unigram_D[d])
        cond = run["shown_cond"]
        codes = sampling.generate(
            model, state.ema_variables, jax.random.key(config.seed), NUM_SHOWN, cond, **config.sample
        )
        images = np.asarray(decode(tokenizer_variables, codes))
        scale = max(1, 64 // images.shape[1])
        return scalars, {"samples": grids.grid(images, columns=9, scale=scale)}

    return Validation(run["validation"], measure, report)


def with_cond(batch: dict[str, np.ndarray], config: ConfigDict, keep: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of a batch that a step reads, with its labels or captions under "cond"."""
    kept = {name: batch[name] for name in keep if name in batch}
    if config.data.text_key:
        kept["cond"] = batch["text"]
    elif config.data.label_key:
        kept["cond"] = batch["label"][:, None]
    return kept


class Conditioned:
    """A data set whose batches hold what a train step reads, with the interface of `data.Dataset`."""

    def __init__(self, dataset: Any, config: ConfigDict):
        self.dataset, self.config, self.batch_size = dataset, config, dataset.batch_size

    def iterator(self) -> "Conditioned":
        """A new iterator from the start."""
        self._batches = self.dataset.iterator()
        self.get_state, self.set_state, self.close = (
            self._batches.get_state, self._batches.set_state, self._batches.close,
        )  # fmt: skip
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return with_cond(next(self._batches), self.config, ("image", "latents", "index"))


def fill_from_tokenizer(config: ConfigDict, tokenizer: checkpoint.LoadedModel) -> None:
    """Fill what the tokenizer decides into `config.model` and `config.data`; what is set by hand must agree.

    Raises:
      ValueError: naming the setting, its value and the tokenizer's.
    """
    settings = tokenizer.config["model"]
    for name in ("codebook_size", "code_shape", "code_dim"):
        theirs = settings[name]
        theirs = tuple(theirs) if isinstance(theirs, (list, tuple)) else theirs
        ours = config.model[name]
        ours = tuple(ours) if isinstance(ours, (list, tuple)) else ours
        if ours is not None and ours != theirs:
            raise ValueError(f"model.{name}: {ours} differs from the tokenizer's {theirs}; leave it unset")
        with config.unlocked():
            del config.model[name]  # a placeholder has a type, and codebook sizes may be one or many
            config.model[name] = theirs
    with config.unlocked():
        config.model.use_shared_codebook = settings["use_shared_codebook"]
        config.data.image_size = settings["image_size"]
        config.data.channels = settings["in_channels"]


def prepare(config: ConfigDict) -> dict[str, Any]:
    """Everything that a run needs except its state; all settings are checked here, before anything compiles."""
    check_sections(config, SECTIONS)
    if not config.tokenizer:
        raise ValueError(
            "config.tokenizer: unset; give --config.tokenizer=<workdir of a stage-1 run>, this preset expects one of "
            f"configs/rqvae.py:{config.tokenizer_preset}"
        )
    mesh = construct(sharding.make_mesh, "mesh", config.mesh)
    tokenizer = checkpoint.load_tokenizer(config.tokenizer)
    fill_from_tokenizer(config, tokenizer)
    model = models.create(**config.model)
    loss = construct(Losses, "loss", config.loss)
    loss.check(model)
    sample = dict(config.sample)
    sampling.check_guidance(model, sample.pop("guidance", None))
    check_filter = functools.partial(sampling.check_filter, top_k=None, top_p=None)  # None: no filter
    construct(check_filter, "sample", sample)
    shard_index, shard_count = sharding.batch_part(mesh)
    shard = dict(shard_index=shard_index, shard_count=shard_count, seed=config.seed)
    open_split = functools.partial(construct, make_dataset, "data", dict(config.data), **shard)
    dataset = open_split(split="train", train=True)
    check_condition(model, dataset, config)
    dataset.examples([0])  # raises where no picture can be read
    loop = resolve_durations(config.loop, "loop", ("total",), dataset.steps_per_epoch)
    settings = construct(LoopSettings, "loop", loop)
    optim = resolve_durations(config.optim, "optim", ("warmup", "hold"), dataset.steps_per_epoch)
    optimizer = construct(make_optimizer, "optim", optim, total_steps=settings.total_steps)
    sharding.check_batch_size(mesh, config.data.batch_size, optimizer.accumulation_steps)
    check_cache(config, settings)
    return dict(
        mesh=mesh, tokenizer=tokenizer, model=model, loss=loss, settings=settings, optimizer=optimizer,
        dataset=dataset, in_order=open_split(split="train", train=False),
        validation=open_split(split="validation", train=False), shown_cond=shown_cond(model, dataset, config),
    )  # fmt: skip


def check_condition(model: Any, dataset: Any, config: ConfigDict) -> None:
    """Refuse a model whose condition the data set does not have.

    Raises:
      ValueError: naming both sides.
    """
    data, V, U = config.data, model.cond_vocab_size, model.cond_length
    if data.label_key and data.text_key:
        raise ValueError(f"data.label_key '{data.label_key}' and data.text_key '{data.text_key}': set one of them")
    if not model.is_conditional:
        if data.label_key or data.text_key:
            raise ValueError(
                f"data.label_key {data.label_key}, data.text_key {data.text_key}: an unconditional model "
                "(model.cond_vocab_size 1) reads neither; leave them unset"
            )
    elif data.text_key:
        if dataset.vocab_size > V or dataset.text_length != U:
            raise ValueError(
                f"model.cond_vocab_size {V} and cond_length {U} do not fit captions of {dataset.text_length} tokens "
                f"out of {dataset.vocab_size}; set them to these"
            )
    elif not data.label_key:
        raise ValueError(f"data.label_key: unset, but the model takes one of {V} conditions; set it or data.text_key")
    elif dataset.num_classes != V or U != 1:
        raise ValueError(
            f"model.cond_vocab_size {V} and cond_length {U} do not fit the {dataset.num_classes} classes of "
            f"'{data.label_key}'; set them to {dataset.num_classes} and 1"
        )


def check_cache(config: ConfigDict, settings: LoopSettings) -> None:
    """Refuse random transforms that a cache of latents would leave out.

    Raises:
      ValueError: naming the setting.
    """
    data = config.data
    if settings.use_latent_cache and jax.process_count() > 1:
        raise ValueError(f"loop.use_latent_cache: True is for one process, not {jax.process_count()}; set it to False")
    if settings.use_latent_cache and (data.train_transform != data.eval_transform or data.text_dropout):
        raise ValueError(
            f"loop.use_latent_cache: it would hold pictures as '{data.eval_transform}' makes them, whole captions, but "
            f"training wants '{data.train_transform}' and text_dropout {data.text_dropout}; set them equal and 0"
        )
    if settings.use_latent_cache and data.flip_probability not in (0, 0.5):
        raise ValueError(
            "loop.use_latent_cache: it would draw a picture or its mirror image with equal chances, but "
            f"data.flip_probability is {data.flip_probability}; set it to 0 or 0.5"
        )


def shown_cond(model: Any, dataset: Any, config: ConfigDict) -> np.ndarray | None:
    """Conditions of the sample grid: all classes in turn, or the first captions of the training set."""
    if config.data.text_key:
        return dataset.examples(np.arange(NUM_SHOWN) % dataset.num_examples)["text"]
    if config.data.label_key:
        return (np.arange(NUM_SHOWN) % model.cond_vocab_size)[:, None]
    return None


def cached_latents(run: dict[str, Any], tokenizer_variables: Any, config: ConfigDict, workdir: str) -> CacheDataset:
    """The latents of the training set, computed once: of every picture and, where flips are on, of its mirror image."""
    directory = Path(workdir) / "latents"
    data, flips = config.data, config.data.flip_probability > 0
    made_from = [
        checkpoint.fingerprint(run["tokenizer"].variables),
        data.name,
        str(data.data_dir),
        str(run["in_order"].num_examples),
        str(flips),
    ]
    names = (
        "train_split",
        "image_size",
        "eval_transform",
        "label_key",
        "text_key",
        "text_tokenizer",
        "text_length",
    )
    made_from += [str(data[name]) for name in names]
    fingerprint = "|".join(made_from)
    encode_batch = jax.jit(functools.partial(encode, run["tokenizer"].model))

    def batches():
        for batch in run["in_order"].iterator():
            images = batch.pop("image")
            views = [images, images[:, :, ::-1]] if flips else [images]
            latents = [np.asarray(encode_batch(tokenizer_variables, view)) for view in views]
            yield {**batch, "latents": np.stack(latents, axis=1)}

    if (read_meta(directory) or {}).get("fingerprint") != fingerprint:
        write_cache(directory, batches(), {"fingerprint": fingerprint}, run["in_order"].num_examples)
    return CacheDataset(directory, data.batch_size, True, config.seed, num_threads=data.num_threads)


def count_training_set(run: dict[str, Any], tokenizer_variables: Any) -> tuple[np.ndarray, list[int] | None]:
    """How often the training set has each code of the frozen tokenizer, and each class.

    Returns:
      Counts of the codes (D, K) of `NUM_COUNTED` pictures or all, and of the classes where all were counted, else None.
    """
    model, V = run["tokenizer"].model, run["in_order"].num_classes
    K = max(run["model"].codebook_sizes)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(run["mesh"]))
    def count(variables, batch):
        codes = model.apply(variables, batch["image"], method="encode_to_codes")
        # Padding rows count as one more code, which is dropped.
        codes = jnp.where(batch["mask"][:, None, None, None], codes, K)
        classes_V = jnp.bincount(batch["label"], batch["mask"].astype(jnp.int32), length=V) if V else None
        return metrics.code_counts(codes, K + 1)[:, :K], classes_V

    names = ("image", "mask", "label") if V else ("image", "mask")
    counts, seen = None, 0
    for batch in run["in_order"].iterator():
        placed = sharding.put_batch(run["mesh"], {name: batch[name] for name in names})
        found = count(tokenizer_variables, placed)
        counts = found if counts is None else jax.tree.map(jnp.add, counts, found)
        seen += len(placed["image"])
        if seen >= NUM_COUNTED:
            break
    counts_DK, classes_V = jax.device_get(counts)
    is_whole = seen >= run["in_order"].num_examples
    return counts_DK, classes_V.tolist() if V and is_whole else None


def unigram_mark(run: dict[str, Any], tokenizer_variables: Any, counts_DK: np.ndarray) -> np.ndarray:
    """Cross-entropy (D,) of the held-out codes under the frequencies of the training set's: the mark to beat."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(run["mesh"]))
    def encode_all(variables, images, mask):
        return run["tokenizer"].model.apply(variables, images, method="encode_to_codes"), mask

    total, count = 0.0, 0
    for batch in run["validation"].iterator():
        placed = sharding.put_batch(run["mesh"], {name: batch[name] for name in ("image", "mask")})
        codes, mask = jax.device_get(encode_all(tokenizer_variables, placed["image"], placed["mask"]))
        total = total + metrics.unigram_cross_entropy(counts_DK, codes[mask]) * mask.sum()
        count += mask.sum()
    return np.asarray(total) / count


def report_soft_codes(run: dict[str, Any], tokenizer_variables: Any) -> None:
    """Print how many codes a soft code spreads over; warn where the temperature makes noise of them."""
    model, loss = run["tokenizer"].model, run["loss"]

    @functools.partial(jax.jit, out_shardings=sharding.replicated(run["mesh"]))
    def perplexity(variables, images):
        soft, _ = model.apply(variables, images[:NUM_SHOWN], loss.temperature, method="soft_codes")
        entropy = -jnp.sum(soft * jnp.log(jnp.where(soft > 0, soft, 1.0)), axis=-1)
        return jnp.exp(entropy.mean((0, 1, 2)))

    images = sharding.put_batch(run["mesh"], next(run["validation"].iterator())["image"])
    spread_D = np.asarray(perplexity(tokenizer_variables, images))
    by_depth = ", ".join(f"{spread:.1f}" for spread in spread_D)
    print(f"soft codes at temperature {loss.temperature}: each spreads over {by_depth} codes by depth")
    if spread_D[0] > NOISE_SPREAD * run["model"].codebook_sizes[0]:
        logger.warning(
            "SOFT CODES ARE NOISE: at loss.temperature %g those of depth 1 spread over %.0f codes; lower it until they "
            "spread over a few (squared distances of this tokenizer set its scale)",
            loss.temperature,
            spread_D[0],
        )


def state_program(config: ConfigDict, run: dict[str, Any], codebook: Any) -> tuple[Callable[..., Any], Any]:
    """What draws the state at step 0 from a key and the tokenizer's codebook, and its shapes with their shardings."""

    def init(rng: jax.Array, codebook: Any) -> TrainState:
        rng_init, rng_train = jax.random.split(rng)
        variables = models.init_variables(run["model"], rng_init)
        if run["model"].uses_codebook:
            variables["codebook"] = {"codebook_KE": codebook}
        return create_state(variables, run["optimizer"], rng_train, run["settings"].ema_decay > 0)

    return init, sharding.sharded_shapes(run["mesh"], init, jax.random.key(config.seed), codebook)


def init_state(config: ConfigDict, run: dict[str, Any], tokenizer_variables: Any) -> TrainState:
    """The state at step 0, drawn on the devices where it will live, with the tokenizer's codebook in place."""
    codebook = tokenizer_variables["codebook"]["codebook_KE"]
    init, shapes = state_program(config, run, codebook)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed), codebook)


def _codebook(tokenizer_variables: Any) -> quantize.Codebook:
    value = tokenizer_variables["codebook"]["codebook_KE"]
    return tuple(value) if isinstance(value, (tuple, list)) else value


def train_and_evaluate(config: ConfigDict, workdir: str, strict: bool = False) -> TrainState:
    """Train a transformer as `config` says, in `workdir`, going on from its newest checkpoint.

    Returns:
      The last state.

    Raises:
      ValueError, FileNotFoundError: bad settings, data or tokenizer, before anything compiles.
    """
    run = prepare(config)
    if Path(workdir).resolve() == Path(config.tokenizer).resolve():
        raise ValueError(f"workdir: '{workdir}' is that of the tokenizer; give stage 2 a --workdir of its own")
    with locked(workdir):
        return _train(run, config, workdir, strict)


def _train(run: dict[str, Any], config: ConfigDict, workdir: str, strict: bool) -> TrainState:
    """Bind the tokenizer, look at its codes, train."""
    checkpoint.bind_tokenizer(workdir, run["tokenizer"])
    if config.data.text_key:  # sampling needs it, and the run directory has to suffice
        load_tokenizer(config.data.text_tokenizer, config.data.text_length).save(Path(workdir) / TEXT_TOKENIZER)
    tokenizer_variables = jax.device_put(run["tokenizer"].variables, sharding.replicated(run["mesh"]))
    counts_DK, class_counts = count_training_set(run, tokenizer_variables)
    report_usage(counts_DK, run["model"].codebook_sizes, run["model"].use_shared_codebook)
    if run["loss"].use_soft_labels or run["loss"].use_stochastic_codes:
        report_soft_codes(run, tokenizer_variables)
    unigram_D = unigram_mark(run, tokenizer_variables, counts_DK)
    dataset = run["dataset"]
    if run["settings"].use_latent_cache:
        dataset = cached_latents(run, tokenizer_variables, config, workdir)
    state = init_state(config, run, tokenizer_variables)
    step = make_train_step(
        run["model"], run["tokenizer"].model, run["optimizer"], run["loss"], run["settings"].ema_decay
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(run["mesh"])))
    state = run(
        workdir=workdir,
        config={**config.to_dict(), "class_names": run["dataset"].class_names, "class_counts": class_counts},
        title="stage 2",
        state=state,
        train_step=lambda state, batch: step(state, batch, tokenizer_variables),
        dataset=Conditioned(dataset, config),
        mesh=run["mesh"],
        settings=run["settings"],
        summarize=summarize,
        validation=make_validation(run, tokenizer_variables, unigram_D, config),
        strict=strict,
        flops_per_image=sum(transformer_flops(run["model"], train=True).values()),
        dtype=run["model"].dtype,
        remedies=memory_remedies(config, run["mesh"], accumulates=True),
        is_locked=True,
    )
    finish(workdir, ["loss", "validation_loss"])
    return state


def report_usage(counts_DK: np.ndarray, sizes: tuple[int, ...], shared: bool) -> None:
    """Print how much of the codebook the training pictures use, over all depths and at each."""
    by_depth = ", ".join(f"{100 * np.mean(row[:K] > 0):.1f}" for row, K in zip(counts_DK, sizes, strict=True))
    overall = metrics.overall_code_usage(counts_DK, sizes, shared)
    print(f"tokenizer: {100 * overall:.1f} % of its codes used on training pictures; by depth {by_depth} %")


if __name__ == "__main__":
    cli.main(train_and_evaluate)
