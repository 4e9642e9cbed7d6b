"""A frozen tokenizer for stage 2: how often each code occurs, the unigram mark, cached latents, codes of a step."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import checkpoint, metrics, models
from rq_jax.data import CacheDataset, Dataset, Splits, fingerprint, read_meta, write_cache
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
    """

    counts_DK: np.ndarray
    class_counts: list[int] | None
    unigram_nats_D: np.ndarray
    spread_D: np.ndarray | None


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
        self._tokenizer, self._variables, self._mesh = tokenizer, variables, mesh
        self._num_steps, self._num_validation_steps = num_steps, num_validation_steps
        self._jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))

    def measure(self, data: Splits, temperature: float | None) -> CodeFigures:
        """All figures of a data set; `temperature` is that of the soft codes, None where none is used."""
        counts_DK, class_counts = self.count(data.ordered)
        unigram_nats_D = self.unigram_nats(data.validation, counts_DK)
        spread_D = None if temperature is None else self.soft_spread(data.validation, temperature)
        return CodeFigures(counts_DK, class_counts, unigram_nats_D, spread_D)

    def _encode(self, variables: Any, images: jax.Array, num_steps: int) -> tuple[jax.Array, jax.Array | None]:
        """Codes (B, h, w, D), and what those of a cell count (B, h, w); None is 1."""
        encode = functools.partial(self._tokenizer.apply, variables, method="encode_to_codes")
        codes = sharding.map_micro_batches(encode, images, num_steps)
        if isinstance(codes, GrainedCodes):
            return codes.codes, cell_weights(codes.grains, self._tokenizer.num_grains)
        return codes, None

    def count(self, dataset: Dataset) -> tuple[np.ndarray, list[int] | None]:
        """How often the data set has each code, and each class.

        Returns:
          Counts of the codes (D, K) of `NUM_COUNTED` images or all, and of the classes where all were counted, else
          None.
        """
        V, K = dataset.num_classes, max(self._tokenizer.codebook_sizes)

        @self._jit
        def count(variables: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
            codes, weights = self._encode(variables, batch["image"], self._num_steps)
            # Rows that fill up a batch count as one more code, which is dropped.
            codes = jnp.where(batch["mask"][:, None, None, None], codes, K)
            classes_V = jnp.bincount(batch["cond"][:, 0], batch["mask"].astype(jnp.int32), length=V) if V else None
            return metrics.code_counts(codes, K + 1, weights)[:, :K], classes_V

        names = ("image", "mask", "cond") if V else ("image", "mask")
        counts, seen = None, 0
        for batch in dataset.iterator():
            placed = sharding.put_batch(self._mesh, {name: batch[name] for name in names})
            of_batch = count(self._variables, placed)
            counts = of_batch if counts is None else jax.tree.map(jnp.add, counts, of_batch)
            seen += len(placed["image"])
            if seen >= NUM_COUNTED:
                break
        counts_DK, classes_V = jax.device_get(counts)
        is_whole = seen >= dataset.num_examples
        return counts_DK, classes_V.tolist() if V and is_whole else None

    def unigram_nats(self, dataset: Dataset, counts_DK: np.ndarray) -> np.ndarray:
        """Cross-entropy in nats (D,) of the codes of a data set under the frequencies of `counts_DK`."""

        @self._jit
        def encode_all(variables: Any, images: jax.Array, mask: jax.Array) -> tuple[Any, ...]:
            return *self._encode(variables, images, self._num_validation_steps), mask

        total, count, sizes = 0.0, 0, self._tokenizer.codebook_sizes
        for batch in dataset.iterator():
            placed = sharding.put_batch(self._mesh, {name: batch[name] for name in ("image", "mask")})
            codes, weights, mask = jax.device_get(encode_all(self._variables, placed["image"], placed["mask"]))
            weights = None if weights is None else weights[mask]
            share = mask.sum() if weights is None else weights.sum()
            nats_D = metrics.unigram_cross_entropy(counts_DK, codes[mask], sizes, weights)
            total, count = total + nats_D * float(share), count + share
        return np.asarray(total) / count

    def soft_spread(self, dataset: Dataset, temperature: float) -> np.ndarray:
        """Over how many codes a soft code spreads at each depth (D,), on the first images."""

        @self._jit
        def perplexity(variables: Any, images: jax.Array) -> jax.Array:
            soft, _ = self._tokenizer.apply(variables, images[:NUM_SPREAD], temperature, method="soft_codes")
            entropy = -jnp.sum(soft * jnp.log(jnp.where(soft > 0, soft, 1.0)), axis=-1)
            return jnp.exp(entropy.mean((0, 1, 2)))

        images = sharding.put_batch(self._mesh, next(dataset.iterator())["image"])
        return np.asarray(perplexity(self._variables, images))


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
        made_from["held out"] = data.validation.num_examples
    if kept := hosts.of_first_process(_read_figures(path, made_from) if is_first else ""):
        figures = json.loads(kept)
        arrays = {name: None if value is None else np.asarray(value) for name, value in figures.items()}
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


def check_cache(data: Mapping[str, Any]) -> None:
    """The transforms of a config's `data` can be read back from a cache of latents.

    Raises:
      ValueError: a random transform that the cache would leave out, or several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(f"loop.use_latent_cache: True is for one process, not {jax.process_count()}; set it to False")
    if data["train_transform"] != data["eval_transform"] or data["text_dropout"]:
        raise ValueError(
            f"loop.use_latent_cache: it would hold images as '{data['eval_transform']}' makes them, whole captions, "
            f"but training wants '{data['train_transform']}' and text_dropout {data['text_dropout']}; set them equal "
            "and 0"
        )
    if data["flip_probability"] not in (0, 0.5):
        raise ValueError(
            "loop.use_latent_cache: it would draw an image or its mirror image with equal chances, but "
            f"data.flip_probability is {data['flip_probability']}; set it to 0 or 0.5"
        )


# Settings of the config section `data` that latents do not depend on: random transforms, which `check_cache` excludes.
_NOT_CACHED = ("validation_split", "train_transform", "flip_probability", "text_dropout")


def encode(tokenizer: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Latents of images, without a gradient."""
    return jax.lax.stop_gradient(tokenizer.apply(variables, images, method="encode"))


def cached_latents(
    tokenizer: nn.Module,
    variables: Any,
    ordered: Dataset,
    data: Mapping[str, Any],
    directory: Path,
    seed: int,
) -> CacheDataset:
    """The training set as latents, computed once: of every image and, where flips are on, of its mirror image.

    Args:
      tokenizer, variables: a cache of other variables is made again.
      ordered: the training set, once through.
      data: the config section.
      directory: of the cache.
      seed: of the order of the batches.
    """
    use_flips = data["flip_probability"] > 0
    made_from = {
        "tokenizer": checkpoint.fingerprint(variables),
        "mirror images": use_flips,
        **fingerprint.of_settings({name: value for name, value in data.items() if name not in _NOT_CACHED}),
        **fingerprint.of_dataset(ordered),
    }
    encode_batch = jax.jit(lambda variables, images: encode(tokenizer, variables, sharding.scale(images)))

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for batch in ordered.iterator():
            images = batch.pop("image")
            views = [images, images[:, :, ::-1]] if use_flips else [images]
            yield {**batch, "latents": np.stack([np.asarray(encode_batch(variables, view)) for view in views], axis=1)}

    meta = read_meta(directory)
    if meta is None or meta["fingerprint"] != made_from:
        if meta is not None:
            what = fingerprint.difference(meta["fingerprint"], made_from)
            logger.warning("'%s': the latents are computed again: %s", directory, what or "an older version made them")
        write_cache(directory, batches(), {"fingerprint": made_from}, ordered.num_examples)
    return CacheDataset(directory, data["batch_size"], True, seed, num_threads=data["num_threads"])


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
