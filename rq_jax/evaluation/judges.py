"""Judges by whose scores samples are chosen: how surely a classifier sees the class, how close CLIP finds the text."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.conditions import class_names
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on
from rq_jax.pretrained import clip, clip_text, efficientnet_lite, resnet
from rq_jax.pretrained.classifier import Classifier
from rq_jax.sampling.rerank import in_batches
from rq_jax.settings.text import quoted

SCORED_PER_DEVICE = 32  # images or texts of one program, whatever the batches in which samples are drawn
IMAGENET_CLASSES = 1000
_FITTED_PER_CLASS = 64  # training images behind the mean of a class, at most
_LEAST_VARIANCE = 1e-3  # of a feature, in that of the average feature


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scores images by how well each fits the class or prompt that it was drawn for.

    Attributes:
      name: of the judge, which belongs to its scores.
      program: (variables, images (b, H, W, C) in bytes, wanted (b, ...)) -> scores (b,), compiled.
      variables: of the program.
      wanted: by group (G, ...), what the program compares an image with.
    """

    name: str
    program: Any
    variables: Any
    wanted: np.ndarray

    @property
    def batch_size(self) -> int:
        """Images that are scored together by the devices of this process."""
        return SCORED_PER_DEVICE * sharding.local_mesh().size

    def start(self) -> Any:
        """The function that scores: images (batch_size, H, W, C), uint8, and their groups to scores (batch_size,)."""
        mesh = sharding.local_mesh()
        variables = jax.device_put(self.variables, sharding.replicated(mesh))

        def score(images: np.ndarray, groups: np.ndarray) -> np.ndarray:
            batch = jax.device_put((images, self.wanted[groups]), sharding.batch_sharding(mesh))
            return np.asarray(self.program(variables, *batch))

        return score


def classifier_judge(loaded: LoadedModel, classes: Sequence[int], file: str | None = None) -> Judge:
    """Scores by a classifier: the log-odds of the wanted class, in the order of its probability.

    ImageNet's classifier judges models of ImageNet's classes as it is. For other classes its features are kept, and
    its last layer is fitted to the training images of the model: see `fit_class_means`.

    Args:
      loaded: a class-conditional transformer.
      classes: by group.
      file: torchvision's ResNet-101; None: EfficientNet-Lite0.

    Raises:
      ValueError: other classes than ImageNet's, and no training images with classes; a class without an image.
      FileNotFoundError: no file, or the package of the stand-in is not installed.
    """
    settings = trained_on(loaded.config, (*IMAGE_SETTINGS, "label_key"))
    is_fitted = not has_imagenet_classes(loaded)
    if is_fitted and not {"name", "label_key"} <= settings.keys():
        raise ValueError(
            f"--by: classifier knows ImageNet's {IMAGENET_CLASSES} classes, and for the {len(class_names(loaded))} of "
            "this model needs its training images, which it does not name; leave it out"
        )
    net = efficientnet_lite.load() if file is None else resnet.load(file)
    name, center = net.name, np.zeros(net.num_features, np.float32)
    kernel, bias = net.variables["classifier"]["kernel"], net.variables["classifier"]["bias"]
    if is_fitted:
        center, kernel, bias = fit_class_means(net, EvaluationData(settings), len(class_names(loaded)))
        name += ", class means of training images"
        if missing := [one for one in classes if not np.isfinite(bias[one])]:
            shown = quoted(class_names(loaded)[missing[0]])
            raise ValueError(f"--by: classifier finds no training image of class {shown}; give other --classes")

    @jax.jit
    def program(variables, images, wanted):
        params, center, kernel, bias = variables
        features = net.features({"params": params}, sharding.scale(images)) - center[None]
        logits = jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]
        is_wanted = jnp.arange(logits.shape[1])[None] == wanted[:, None]
        # Near a probability of 1 the odds still tell images apart, and the probability itself does not.
        others = jax.nn.logsumexp(jnp.where(is_wanted, -jnp.inf, logits), axis=1)
        return jnp.sum(jnp.where(is_wanted, logits, 0), axis=1) - others

    return Judge(name, program, (net.variables["params"], center, kernel, bias), np.asarray(classes, np.int32))


def clip_judge(prompts: Sequence[str], file: str) -> Judge:
    """Scores by CLIP: the cosine between the features of an image and of its text.

    Args:
      prompts: by group.
      file: OpenAI's ViT-B/32.

    Raises:
      FileNotFoundError: no such file, or the packages of CLIP's vocabulary are not installed.
      ValueError: a file of another network, or a text of more than 77 tokens.
    """
    tokens, net = clip_text.load_tokenizer()(prompts), clip.load(file)

    @jax.jit
    def of_texts(variables, tokens):
        return _unit(net.text_features(variables, tokens))

    @jax.jit
    def program(variables, images, wanted):
        return jnp.sum(_unit(net.features(variables, sharding.scale(images))) * wanted, axis=-1)

    features = _map_first(of_texts, {"text": net.variables["text"]}, [(tokens,)])
    return Judge(net.name, program, {"image": net.variables["image"]}, np.concatenate([found for (found,) in features]))


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def has_imagenet_classes(loaded: LoadedModel) -> bool:
    """Whether the classes of a transformer are ImageNet's 1,000 in their order.

    So they are where there are as many, and the model was trained on `imagenet2012`, on folders with ImageNet's own
    names, or, as a converted one, on data with classes that it does not name.
    """
    names, data = class_names(loaded), trained_on(loaded.config, ("name", "label_key"))
    has_ids = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    is_known = has_ids or data.get("name", "").startswith("imagenet") or "label_key" not in data
    return len(names) == IMAGENET_CLASSES and is_known


def fit_class_means(net: Classifier, data: EvaluationData, num_classes: int) -> tuple[np.ndarray, ...]:
    """Fits a linear classifier on features to the means of classes, of which each feature varies by itself alike.

    The logits are those of normal distributions with one diagonal covariance and no preference for a class. At most 64
    images of a class count.

    Args:
      net: gives the features.
      data: with classes, of which the training images are taken.
      num_classes: C.

    Returns:
      The center (A,) that is taken off features, kernel (A, C) and bias (C,): -inf for a class without an image.
    """

    @jax.jit
    def features_of(variables, images):
        return net.features(variables, sharding.scale(images))

    dataset, A = data.training(), net.num_features
    counts_C, sums_CA, squares_A = np.zeros(num_classes), np.zeros((num_classes, A)), np.zeros(A)
    batches = counted(dataset.iterator(), dataset.num_examples, data.batch_size, "classes of training images")
    for features_NA, labels in _map_first(features_of, net.variables, _first_of_classes(batches)):
        features_NA = features_NA.astype(np.float64)
        np.add.at(counts_C, labels, 1)
        np.add.at(sums_CA, labels, features_NA)
        squares_A += np.sum(features_NA**2, axis=0)
    return _linear(counts_C, sums_CA, squares_A)


def _linear(counts_C: np.ndarray, sums_CA: np.ndarray, squares_A: np.ndarray) -> tuple[np.ndarray, ...]:
    """Center, kernel and bias, of sums of features by class and of their squares."""
    N, means_CA = counts_C.sum(), sums_CA / np.maximum(counts_C, 1)[:, None]
    within_A = squares_A - np.sum(counts_C[:, None] * means_CA**2, axis=0)
    variances_A = within_A / max(N - np.count_nonzero(counts_C), 1)
    variances_A = np.maximum(variances_A, _LEAST_VARIANCE * variances_A.mean() + 1e-12)
    center_A = sums_CA.sum(0) / N
    means_CA = means_CA - center_A  # else the logits of all classes were large and alike
    bias_C = np.where(counts_C > 0, -0.5 * np.sum(means_CA**2 / variances_A, axis=1), -np.inf)
    return tuple(array.astype(np.float32) for array in (center_A, (means_CA / variances_A).T, bias_C))


def _map_first(
    program: Callable[[Any, Any], jax.Array], variables: Any, batches: Iterable[tuple[np.ndarray, ...]]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches of any size in batches of one, with what a program makes of the first array in its place."""
    mesh = sharding.local_mesh()
    variables, size = jax.device_put(variables, sharding.replicated(mesh)), SCORED_PER_DEVICE * mesh.size
    for first, *rest in in_batches(batches, size):
        filled = np.resize(np.arange(len(first)), size)
        found = program(variables, jax.device_put(first[filled], sharding.batch_sharding(mesh)))
        yield np.asarray(found)[: len(first)], *rest


def _first_of_classes(batches: Iterable[dict[str, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the first images of each class."""
    seen: Counter[int] = Counter()
    for batch in batches:
        labels, taken = batch["cond"][:, 0], batch["mask"].copy()
        for i in np.flatnonzero(taken):
            seen[int(labels[i])] += 1
            taken[i] = seen[int(labels[i])] <= _FITTED_PER_CLASS
        yield batch["image"][taken], labels[taken]
