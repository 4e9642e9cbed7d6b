"""Optimizers with their learning-rate schedules."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from rq_jax.devices import sharding
from rq_jax.nn import placement
from rq_jax.settings import checks

# Weight decay is for matrices and convolution kernels alone. The stage-2 trainer was never released; minGPT, on which
# the original model is built, spares biases, norms, embeddings and positions.
_NO_DECAY = re.compile(r"(bias|scale|embedding|position)")
# The matrices inside a network, which Muon moves as a whole: axes summed over, axes of the result; others count up
# matrices, such as layers, or queries, keys and values. Axes from the end, as a scan over layers adds one in front.
_MATRICES = {
    "qkv_M3NA": ((-4,), (-2, -1)),
    "out_NAM": ((-3, -2), (-1,)),
    "up_MF": ((-2,), (-1,)),
    "down_FM": ((-2,), (-1,)),
}
_CONVOLUTION: tuple[tuple[int, ...], tuple[int, ...]] = ((-4, -3, -2), (-1,))  # patches to channels
_MAX_PIXEL_CHANNELS = 4  # a convolution of so few reads or writes images
# Root mean square of Adam's updates, so that its learning rates and weight decay hold (Liu et al. 2025, equation 4).
_ADAM_RMS = 0.2


class Optimizer(NamedTuple):
    """Gradient transformation, learning rate by step, micro-batches to average before one update, and how.

    The transformation of `make_optimizer` takes a `pace`, see `TrainState`; one made by hand may do without.
    """

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    accumulation_steps: int
    use_sharded_gradients: bool = False

    def update(self, grads: Any, state: Any, params: Any, pace: Any) -> tuple[Any, Any]:
        """Updates of the parameters, and the next state of `transform`."""
        return optax.with_extra_args_support(self.transform).update(grads, state, params, pace=pace)


def make_optimizer(
    section: str = "optim",
    /,
    *,
    name: str = "adam",
    learning_rate: float,
    total_steps: int,
    b1: float = 0.9,
    b2: float = 0.999,
    mu_dtype: str | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    hold_steps: int = 0,
    initial_learning_rate: float = 0.0,
    final_learning_rate: float = 0.0,
    clip_norm: float | None = None,
    accumulation_steps: int = 1,
    use_sharded_gradients: bool = False,
) -> Optimizer:
    """Optimizer of one network; the keywords are a config section.

    Args:
      section: name of that section, for messages.
      name: "adam", "adamw" (decoupled decay of matrices and kernels only), "adafactor" (as "adamw", but of the second
        moments of matrices, at least 32 x 32, only means over rows and columns are kept), "muon" (as "adamw", but the
        matrices inside a network, see `axes_of`, move by their orthogonalised momentum, at the size of Adam's updates;
        Jordan et al. 2024, Liu et al. 2025) or "sgd".
      learning_rate: the highest rate, reached after the warm-up.
      total_steps: length of the run, in updates.
      b1: of Adam, Adafactor and Muon; b2: of Adam, and of what Muon leaves to it; momentum: of SGD.
      mu_dtype: of the first moments of all but SGD, "float32" or "bfloat16"; None: as the parameters.
      weight_decay: of AdamW, Adafactor and Muon.
      schedule: after warm-up and hold "cosine" down to `final_learning_rate` at `total_steps`, or "constant".
      warmup_steps: linear from `initial_learning_rate`, which is the rate of the first update, as in the original.
      hold_steps: at the highest rate between the warm-up and the cosine (the original's buffer).
      clip_norm: largest global gradient norm; None: no clipping.
      accumulation_steps: micro-batches averaged before an update.
      use_sharded_gradients: sum the gradients of each micro-batch over the devices along fsdp, each of which then adds
        up its part of them; else each adds up all of its own, which are summed over devices once an update.

    Raises:
      ValueError: a name or value that is not allowed.
    """
    checks.one_of(f"{section}.name", name, ("adam", "adamw", "adafactor", "muon", "sgd"))
    if name not in ("adafactor", "muon"):
        checks.unread(f"{section}.weight_decay", weight_decay, "adamw", name)
    if mu_dtype is not None:
        checks.one_of(f"{section}.mu_dtype", mu_dtype, ("float32", "bfloat16"))
        if name == "sgd":
            raise ValueError(f"{section}.mu_dtype: {mu_dtype} is of first moments, and 'sgd' has none; leave it out")
    checks.unread(f"{section}.momentum", momentum, "sgd", name)
    if clip_norm is not None:
        checks.above(f"{section}.clip_norm", clip_norm, 0, fix="None clips nothing")
    checks.at_least(f"{section}.accumulation_steps", accumulation_steps, 1)
    if use_sharded_gradients and accumulation_steps == 1:
        raise ValueError(f"{section}.use_sharded_gradients: True is of micro-batches; set accumulation_steps above 1")
    rate = _make_schedule(
        section, schedule, total_steps, warmup_steps, hold_steps,
        float(learning_rate), initial_learning_rate, final_learning_rate,
    )  # fmt: skip
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    if name == "adam":
        parts = [optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype)]
    elif name == "adamw":
        parts = [optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype), decay]
    elif name == "adafactor":
        parts = [*_adafactor(b1, mu_dtype), decay]
    elif name == "muon":
        parts = [_muon(b1, b2, mu_dtype), decay]
    else:
        parts = [optax.trace(momentum) if momentum else optax.identity()]
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    transform = optax.chain(*clip, optax.chain(*parts, _scale_by_rate(rate)))
    transform = optax.GradientTransformationExtraArgs(transform.init, _with_standard_promotion(transform.update))
    return Optimizer(transform, _with_standard_promotion(rate), accumulation_steps, use_sharded_gradients)


def _adafactor(b1: float, mu_dtype: str | None) -> list[optax.GradientTransformation]:
    """Adafactor in the place of Adam: no scaling by the parameters, momentum.

    Of an array with more axes the two longest are a matrix: M and A of the heads of attention.
    """
    return [
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
        optax.clip_by_block_rms(1.0),
        optax.ema(b1, debias=False, accumulator_dtype=mu_dtype),
    ]


def _muon(b1: float, b2: float, mu_dtype: str | None) -> optax.GradientTransformation:
    """Muon in the place of Adam for the matrices inside a network, and Adam for the rest."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: "adam" if axes_of(path, x) is None else "muon", params)

    def axes(updates: Any) -> Any:
        return jax.tree_util.tree_map_with_path(axes_of, updates)

    def resized(update: jax.Array, pair: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        longest = max(math.prod(update.shape[axis] for axis in axes) for axes in pair)
        return update * (_ADAM_RMS * longest**0.5)

    orthogonalised = _by_layer(optax.contrib.scale_by_muon(beta=b1, mu_dtype=mu_dtype, weight_dimension_numbers=axes))
    as_adams = optax.stateless(lambda updates, _: jax.tree.map(resized, updates, axes(updates)))
    adam = optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype)
    return optax.partition({"muon": optax.chain(orthogonalised, as_adams), "adam": adam}, labels)


def _by_layer(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon with every matrix whole on its device, and the layers of a stack on different devices.

    Parameters are split along their width, and each of some fifteen products would gather its matrix anew. What comes
    out is placed as well as what goes in: left free, XLA lets the products lie as the moments are stored.
    """

    def whole(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(place, tree)

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        is_stack = str(path[-1].key) in _MATRICES and sharding.logical_axes(path, leaf.ndim).startswith("-")
        return placement.place(leaf, ("L" if is_stack else "-").ljust(leaf.ndim, "-"))

    def update(updates: Any, state: optax.contrib.MuonState, params: Any = None) -> tuple[Any, Any]:
        updates, state = muon.update(whole(updates), state._replace(mu=whole(state.mu)), params)
        return whole(updates), state._replace(mu=whole(state.mu))

    return optax.GradientTransformation(muon.init, update)


def axes_of(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """Axes of the matrices in a parameter, which Muon moves as a whole.

    These are the matrices of attention, MLPs and convolutions. None for the others: embeddings and their projections,
    classifiers, convolutions that read or write images, biases and norms.
    """
    name = str(path[-1].key)
    if name == "kernel" and leaf.ndim == 4:
        axes = _CONVOLUTION if min(leaf.shape[2:]) > _MAX_PIXEL_CHANNELS else None
    else:
        axes = _MATRICES.get(name)
    return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)


def _scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` that passes through its schedule `pace` times as fast, a number of the program."""

    def update(updates: Any, state: Any, params: Any = None, *, pace: Any = 1.0, **_: Any) -> tuple[Any, Any]:
        paced = optax.scale_by_learning_rate(lambda count: rate(count * pace))
        return paced.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optax.scale_by_learning_rate(rate).init, update)


def _with_standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under JAX's standard promotion, whatever the caller's: Optax multiplies integer counts by floats."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **keywords)

    return call


def _make_schedule(
    section: str,
    schedule: str,
    total_steps: int,
    warmup_steps: int,
    hold_steps: int,
    peak: float,
    initial: float,
    final: float,
) -> optax.Schedule:
    """Linear from `initial` to `peak`, hold, then cosine to `final` or constant."""
    checks.one_of(f"{section}.schedule", schedule, ("cosine", "constant"))
    checks.unread(f"{section}.final_learning_rate", final, "cosine", schedule)
    checks.unread(f"{section}.hold_steps", hold_steps, "cosine", schedule)
    checks.above(f"{section}.learning_rate", peak, 0)
    checks.within(f"{section}.final_learning_rate", final, 0, peak, meaning="the peak")
    checks.within(f"{section}.initial_learning_rate", initial, 0, peak, meaning="the peak")
    checks.in_range(f"{section}.warmup_steps", warmup_steps, 0, total_steps, "the steps of the run")
    left = total_steps - warmup_steps
    checks.in_range(f"{section}.hold_steps", hold_steps, 0, left, "the steps after the warm-up")
    if initial and not warmup_steps:
        raise ValueError(f"{section}.initial_learning_rate: {initial} needs a warm-up; set it to 0 or set warmup_steps")
    main = optax.constant_schedule(peak)
    if schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(left - hold_steps, 1), final / peak)
    boundary = warmup_steps + hold_steps
    if not boundary:
        return main
    # The rising line is evaluated through the hold too, where it has already reached the peak.
    warmup = optax.linear_schedule(initial if warmup_steps else peak, peak, max(warmup_steps, 1))
    return optax.join_schedules([warmup, main], [boundary])


def decay_mask(params: Any) -> Any:
    """True for matrices and convolution kernels; False for biases, norms, embeddings and positions."""

    def decays(path: Any, _: Any) -> bool:
        return not _NO_DECAY.search(str(path[-1].key))

    return jax.tree_util.tree_map_with_path(decays, params)
