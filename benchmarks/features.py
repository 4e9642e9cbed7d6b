"""The networks whose features measure and judge sets of images: images a second, on all devices, of random weights."""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing, weights
from rq_jax.devices import sharding
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.models.flops import Work, count_traced
from rq_jax.pretrained import clip, efficientnet_lite, inception, resnet
from rq_jax.pretrained.classifier import Classifier

Config = dict[str, Any]


def _classifier(module: Any, network: Any) -> Callable[[], Classifier]:
    return lambda: Classifier(module.__name__, weights.draw(module.abstract_variables()), network(), module.preprocess)


# What `evaluate.py` knows them by; CLIP's text tower runs once a caption and is not measured.
NETS: dict[str, Callable[[], Any]] = {
    "efficientnet_lite0": _classifier(efficientnet_lite, efficientnet_lite.EfficientNetLite0),
    "inception": _classifier(inception, inception.InceptionV3),
    "resnet101": _classifier(resnet, resnet.ResNet101),
    "clip": lambda: clip.CLIP("clip", weights.draw(clip.abstract_variables())),
}


def groups(args: argparse.Namespace) -> list[list[Config]]:
    """A configuration for each network, side and batch."""
    sizes = itertools.product(args.net, args.image_size, args.batch)
    return [[{"net": net, "image_size": side, "batch": batch}] for net, side, batch in sizes]


def build(config: Config, args: argparse.Namespace) -> timing.Program:
    """Features of a batch of random images, prepared as `evaluate.py` does, from the host's memory to its own."""
    net, mesh = NETS[config["net"]](), sharding.make_mesh()
    protocol, B, side = PROTOCOLS["house"], config["batch"], config["image_size"]
    sharding.check_batch_size(mesh, B, setting="--batch")

    def features(variables: Any, images: jax.Array) -> jax.Array:
        return net.features(variables, protocol.prepare(images, config["net"], False))

    variables = jax.device_put(net.variables, sharding.replicated(mesh))
    images = {"image": np.random.default_rng(0).uniform(-1, 1, (B, side, side, 3)).astype(np.float32)}
    placed = sharding.put_batch(mesh, images)["image"]
    compiled = timing.compile_program(features, variables, placed, out_shardings=sharding.replicated(mesh))
    counts = count_traced(features, variables, jax.ShapeDtypeStruct(placed.shape, jnp.float32))
    return timing.Program(
        lambda: np.asarray(compiled.call(variables, sharding.put_batch(mesh, images)["image"])),
        B, compiled.seconds, compiled.memory, {"features": Work(counts.flops, counts.bytes)}, num_devices=mesh.size,
    )  # fmt: skip
