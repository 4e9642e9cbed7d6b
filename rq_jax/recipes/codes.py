"""A frozen tokenizer for stage 2: how often each code and position occurs, the unigram marks, codes of a step."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import metrics, models
from rq_jax.data import Dataset, Splits, fingerprint
from rq_jax.devices import hosts, sharding
from rq_jax.files import read_json, write_json
from rq_jax.grains import GrainedCodes, cell_weights
from rq_jax.training.optimizer import Optimizer

# Training images behind the unigram mark and the code usage, where the training set is larger.
NUM_COUNTED = 20_000
FIGURES = "codes.json"  # in the run directory
NUM_SPREAD = 36  # images behind the spread of soft codes
NOISE_SPREAD = 0.2  # of the codebook, above which soft codes of depth 1 say little

logger = logging.getLogger(__name__)


class CodeFigures(NamedTuple):
    """What stage 2 knows of the codes before its first step.

    Attributes:
      counts_DK: how often the training images have each code; one of a coarse region counts once.
      class_counts: how often each class, where all were counted; else None.
      unigram_nats_D: cross-entropy of the held-out codes under these frequencies.
      spread_D: over how many codes a soft code spreads; None where none is used.
      position_nats_G: cross-entropy of the held-out positions of each grain under their frequencies in the training
        set, where a start token is one symbol, whatever its class; None without grains, as what follows.
      mean_position_nats: of all positions together.
      tokens_per_image: mean over the training images.
    """

    counts_DK: np.ndarray
    class_counts: list[int] | None
    unigram_nats_D: np.ndarray
    spread_D: np.ndarray | None
    position_nats_G: np.ndarray | None = None
    mean_position_nats: float | None = None
    tokens_per_image: float | None = None


class Counts(NamedTuple):
    """How often a data set has what stage 2 predicts.

    Attributes:
      images: so many were counted.
      codes_DK: each code at each depth; one of a coarse region counts once.
      classes_V: each class; None without classes.
      regions_Guv: how many images have each grain in each region; None without grains.
    """

    images: Any
    codes_DK: Any
    classes_V: Any
    regions_Guv: Any

    @property
    def positions(self) -> list[np.ndarray]:
        """How often each position of each grain is to be predicted: its cells, eos and, but for grain 0, sos."""
        return [
            np.concatenate([np.repeat(regions_uv, 4**g), [self.images] * (1 + (g > 0))])
            for g, regions_uv in enumerate(self.regions_Guv)
        ]


class CodeCounter:
    """The codes of a frozen tokenizer on a data set, batch by batch over the mesh."""

    def __init__(
        self,
        tokenizer: nn.Module,
        variables: Any,
        mesh: jax.sharding.Mesh,
        num_steps: int = 1,
        num_validation_steps: int = 1,
    ):
        """Prepare to count.

        Args:
          tokenizer: an `RQVAE` or a `DQVAE`.
          variables: its, placed on the mesh.
          mesh: its data and fsdp devices share a batch.
          num_steps: micro-batches that a batch is encoded in, a divisor of the images of a device.
          num_validation_steps: the same of held-out images.
        """
        self.tokenizer, self._variables, self._mesh = tokenizer, variables, mesh
        self._num_steps, self._num_validation_steps = num_steps, num_validation_steps

    def measure(self, data: Splits, temperature: float | None) -> CodeFigures:
        """All figures of a data set; `temperature` is that of the soft codes, None where none is used."""
        counted, held_out = self.count(data.ordered), self.count(data.validation, is_held_out=True)
        sizes = self.tokenizer.codebook_sizes
        return CodeFigures(
            counted.codes_DK,
            None if counted.classes_V is None else counted.classes_V.tolist(),
            metrics.unigram_cross_entropy(counted.codes_DK, held_out.codes_DK, sizes),
            None if temperature is None else self.soft_spread(data.validation, temperature),
            **_of_positions(counted, held_out),
        )

    def count(self, dataset: Dataset, is_held_out: bool = False) -> Counts:
        """Counts of the first `NUM_COUNTED` images, of classes where these are all; or of all held-out images."""
        names = ("image", "mask", *["cond"] * bool(dataset.num_classes))
        num_steps = self._num_validation_steps if is_held_out else self._num_steps
        total, seen = None, 0
        for batch in dataset.iterator():
            placed = sharding.put_batch(self._mesh, {name: batch[name] for name in names})
            of_batch = self._count_batch(self._variables, placed, num_steps, dataset.num_classes)
            total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
            seen += len(placed["image"])
            if not is_held_out and seen >= NUM_COUNTED:
                break
        total = jax.device_get(total)
        return total if seen >= dataset.num_examples else total._replace(classes_V=None)

    @functools.cached_property
    def _count_batch(self) -> Callable[..., Counts]:
        K, G = max(self.tokenizer.codebook_sizes), self.tokenizer.num_grains

        @functools.partial(jax.jit, static_argnums=(2, 3), out_shardings=sharding.replicated(self._mesh))
        def count(variables: Any, batch: Mapping[str, jax.Array], num_steps: int, V: int | None) -> Counts:
            encode = functools.partial(self.tokenizer.apply, variables, method="encode_to_codes")
            codes, mask_B = sharding.map_micro_batches(encode, batch["image"], num_steps), batch["mask"]
            weights, regions_Guv = None, None
            if isinstance(codes, GrainedCodes):
                codes, grains = codes
                weights = cell_weights(grains, G)
                is_grain = jax.nn.one_hot(grains, G, dtype=jnp.int32, axis=1)
                regions_Guv = jnp.sum(is_grain * mask_B[:, None, None, None].astype(jnp.int32), axis=0)
            # Rows that fill up a batch count as one more code, which is dropped.
            codes = jnp.where(mask_B[:, None, None, None], codes, K)
            counts_DK = metrics.code_counts(codes, K + 1, weights)[:, :K]
            numbers_B = mask_B.astype(jnp.int32)
            classes_V = jnp.bincount(batch["cond"][:, 0], numbers_B, length=V) if V else None
            return Counts(jnp.sum(numbers_B), counts_DK, classes_V, regions_Guv)

        return count

    def soft_spread(self, dataset: Dataset, temperature: float) -> np.ndarray:
        """Over how many codes a soft code spreads at each depth (D,), on the first images."""

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self._mesh))
        def perplexity(variables: Any, images: jax.Array) -> jax.Array:
            soft, _ = self.tokenizer.apply(variables, images[:NUM_SPREAD], temperature, method="soft_codes")
            entropy = -jnp.sum(soft * jnp.log(jnp.where(soft > 0, soft, 1.0)), axis=-1)
            return jnp.exp(entropy.mean((0, 1, 2)))

        images = sharding.put_batch(self._mesh, next(dataset.iterator())["image"])
        return np.asarray(perplexity(self._variables, images))


def _of_positions(counted: Counts, held_out: Counts) -> dict[str, Any]:
    """Those of the `CodeFigures` that only tokenizers with grains have."""
    if counted.regions_Guv is None:
        return {}
    pairs = list(zip(counted.positions, held_out.positions, strict=True))
    nats_G = np.array([metrics.unigram_cross_entropy(*pair) for pair in pairs])
    numbers, numbers_G = (np.array([each.sum() for each in column]) for column in zip(*pairs, strict=True))
    return {
        "position_nats_G": nats_G,
        "mean_position_nats": np.average(nats_G, weights=numbers_G),
        "tokens_per_image": 1 + numbers.sum() / counted.images,  # nothing predicts the first
    }


def num_validation_steps(config: Mapping[str, Any], optimizer: Optimizer) -> int:
    """Micro-batches of an evaluation: those of a step, or one where held-out images have batches of their own."""
    has_own = (config.get("data") or {}).get("validation_batch_size")
    return 1 if has_own else optimizer.accumulation_steps


def kept_figures(
    workdir: Path, tokenizer_mark: str, counter: CodeCounter, data: Splits, temperature: float | None
) -> CodeFigures:
    """The figures in a run directory if they are of this tokenizer and data, else measured and kept there.

    Args:
      workdir: of a run that is bound to its data; the first process reads and writes there.
      tokenizer_mark: fingerprint of the tokenizer.
      counter, data, temperature: see `CodeCounter.measure`.
    """
    path, is_first, made_from = workdir / FIGURES, jax.process_index() == 0, None
    if is_first:
        record = read_json(workdir / fingerprint.RECORD)
        made_from = {"tokenizer": tokenizer_mark, "temperature": temperature, "counted": NUM_COUNTED, "data": record}
        made_from |= {"held out": data.validation.num_examples, **routing_of(counter.tokenizer)}
    if kept := hosts.of_first_process(_read_figures(path, made_from) if is_first else ""):
        figures = json.loads(kept)
        arrays = {name: np.asarray(value) if isinstance(value, list) else value for name, value in figures.items()}
        return CodeFigures(**{**arrays, "class_counts": figures["class_counts"]})
    measured = counter.measure(data, temperature)
    if is_first:
        plain = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in measured._asdict().items()}
        write_json(path, {"made_from": made_from, "figures": plain}, indent=None)
    return measured


def _read_figures(path: Path, made_from: Mapping[str, Any] | None) -> str:
    """The figures in a file as JSON; "" where there are none, or others than are asked for."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no file, or a damaged one: measured again
        record = read_json(path)
        if record["made_from"] == made_from and set(record["figures"]) == set(CodeFigures._fields):
            return json.dumps(record["figures"])
    return ""


def report_soft_codes(spread_D: np.ndarray, codebook_size: int, temperature: float) -> None:
    """Print over how many codes a soft code spreads; warn where the temperature makes noise of them."""
    by_depth = ", ".join(f"{spread:.1f}" for spread in spread_D)
    print(f"soft codes at temperature {temperature}: each spreads over {by_depth} codes by depth")
    if spread_D[0] > NOISE_SPREAD * codebook_size:
        logger.warning(
            "SOFT CODES ARE NOISE: at loss.temperature %g those of depth 1 spread over %.0f codes; lower it until "
            "they spread over a few (squared distances of this tokenizer set its scale)",
            temperature,
            spread_D[0],
        )


def report_usage(counts_DK: np.ndarray, sizes: tuple[int, ...], is_shared: bool) -> None:
    """Print how much of the codebook the training images use, over all depths and at each."""
    by_depth = ", ".join(f"{100 * np.mean(row[:K] > 0):.1f}" for row, K in zip(counts_DK, sizes, strict=True))
    overall = metrics.overall_code_usage(counts_DK, sizes, is_shared)
    print(f"tokenizer: {100 * overall:.1f} % of its codes used on training images; by depth {by_depth} %")


def encode(tokenizer: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Latents of images, without a gradient."""
    return jax.lax.stop_gradient(tokenizer.apply(variables, images, method="encode"))


def draw(
    draw_codes: Callable[..., tuple[jax.Array, jax.Array]],
    tokenizer: nn.Module,
    variables: Any,
    batch: Mapping[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Codes of a batch and the residuals behind them, as a step of stage 2 learns from them; no gradient passes.

    Devices along tensor hold the same tokenizer and codebook: they share the batch.

    Args:
      draw_codes: latents and codebook to codes and residuals.
      tokenizer: an `RQVAE`; variables: its.
      batch: "latents" (B, h', w', E) of the cache, else "image" (B, H, W, C).
      mesh: that the batch is laid out over.
    """
    latents = batch.get("latents")
    if latents is None:
        latents = encode(tokenizer, variables, sharding.split_batch(mesh, batch["image"], sharding.AXES))
    latents = sharding.split_batch(mesh, latents, sharding.AXES)
    # Whole, or XLA splits it as soft labels are, and gathers it again for every block of the search.
    codebook = sharding.split_batch(mesh, codebook_of(variables), axes=())
    return sharding.split_batch(mesh, jax.lax.stop_gradient(draw_codes(latents, codebook=codebook)))


def routing_of(tokenizer: nn.Module) -> dict[str, Any]:
    """What decides the codes of a tokenizer beside its variables, as JSON reads it back: how it gives grains."""
    if tokenizer.num_grains == 1:
        return {}
    names = "router", "thresholds", "entropy_bins", "fine_ratio"
    return json.loads(json.dumps({f"tokenizer.{name}": getattr(tokenizer, name) for name in names}, default=float))


def codebook_of(variables: Any) -> Any:
    """The codebook of a tokenizer's variables, as the functions of `quantize` take it."""
    return _as_tuple(variables["codebook"]["codebook_KE"])


def fill_from_tokenizer(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], has_grains: bool
) -> dict[str, Any]:
    """The stage-2 config with what the tokenizer decides in `model` and `data`; what is set by hand must agree.

    Args:
      config: of stage 2; tokenizer_config: of stage 1.
      has_grains: whether the model takes tokenizers with grains, or without.

    Raises:
      ValueError: a tokenizer of the other kind, or naming the setting, its value and the tokenizer's.
    """
    tokenizer, model = dict(tokenizer_config["model"]), dict(config["model"])
    names = ["codebook_size", "code_shape", "code_dim"]
    holds = f"tokenizer: '{config['tokenizer']}' holds a '{tokenizer['name']}', whose regions have"
    if has_grains != ("num_grains" in tokenizer):
        has, takes = ("equal", "dqvae") if has_grains else ("unlike", "rqvae")
        raise ValueError(f"{holds} {has} numbers of codes; a model '{model['name']}' takes an '{takes}'")
    if has_grains:
        names.append("num_grains")
        tokenizer["code_shape"] = models.create(**tokenizer).code_shape
    for name in names:
        decided, given = (_as_tuple(settings.get(name)) for settings in (tokenizer, model))
        if given is not None and given != decided:
            raise ValueError(f"model.{name}: {given} differs from the tokenizer's {decided}; leave it unset")
        model[name] = decided
    model["use_shared_codebook"] = tokenizer["use_shared_codebook"]
    data = {**config["data"], "image_size": tokenizer["image_size"], "channels": tokenizer["in_channels"]}
    return {**config, "model": model, "data": data}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
