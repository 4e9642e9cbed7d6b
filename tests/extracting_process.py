"""A process that extracts features of made-up images into a cache, for tests that kill it, measure it, or run two of it.

python tests/extracting_process.py --cache=.. --out=.. [--num_images=..] [--side=..] [--num_features=..] [--block=..]

It writes what it found as JSON: digests of sums and features, and its highest memory in bytes.
"""

import argparse
import functools
import hashlib
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.devices import hosts, sharding
from rq_jax.evaluation import store
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.features import FeatureExtractor
from rq_jax.files import write_json

CELLS, CLASSES = 8, 5


class Cheap:
    """Means of 8x8 cells of images, mixed to as many features as are asked for."""

    name = "cheap"

    def __init__(self, num_features):
        rng = np.random.default_rng(0)
        self.variables = {"mix": rng.normal(size=(CELLS**2 * 3, num_features)).astype(np.float32) / 8}

    def features(self, variables, images):
        B, H, W, C = images.shape
        cells = images.reshape(B, CELLS, H // CELLS, CELLS, W // CELLS, C).mean((2, 4))
        return jnp.tanh(cells.reshape(B, -1) @ variables["mix"])

    def logits(self, variables, features):
        return 3 * features[:, :CLASSES]


def batches(first, num_images, batch_size, side, part=(0, 1)):
    """Made-up images from a batch on, cheap and each another one: some noise in many tints. Every 97th is damaged."""
    shard, count = part
    rows = slice(shard * batch_size // count, (shard + 1) * batch_size // count)
    noise = np.random.default_rng(0).integers(0, 64, (batch_size, side, side, 3), np.uint8)
    for number in range(first, -(-num_images // batch_size)):
        tints = np.random.default_rng(number).integers(0, 192, (batch_size, 2, side, 3), np.uint8)
        images = noise + np.repeat(tints, side // 2, axis=1)
        index = number * batch_size + np.arange(batch_size, dtype=np.int32)
        mask = (index < num_images) & (index % 97 != 5)
        yield {"image": images[rows], "mask": mask[rows], "index": index[rows]}


def extract(args, open_batches=None, place=None):
    """The features of the made-up images; `open_batches` and `place` in the place of its own."""
    mesh = sharding.make_mesh()
    extractor = FeatureExtractor(Cheap(args.num_features), mesh)
    sizes = args.num_images, args.batch_size
    part = sharding.batch_part(mesh)

    def open_own(first):
        return counted(batches(first, *sizes, args.side, part), *sizes, "made-up images", first)

    key = {"images": f"{args.num_images} of {args.side}", "extractor": "cheap"}
    settings = {"num_images": args.num_images, "batch_size": args.batch_size, "num_splits": 3}
    place = place or store.Place(Path(args.cache), key)
    return extractor.extract(open_batches or open_own, place=place, **settings)


def summary(found):
    """What is compared: digests of everything, and a few numbers."""
    arrays = {"positions": found.positions, "vectors": found.vectors}
    for d, (moments, score) in enumerate(zip(found.moments, found.scores, strict=True)):
        arrays |= {f"mean_{d}": moments.mean, f"scatter_{d}": moments.scatter}
        arrays |= {f"{name}_{d}": array for name, array in score._asdict().items()}
    digests = {name: hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for name, array in arrays.items()}
    numbers = {"count": found.moments[0].count, "trace": float(np.trace(found.moments[0].covariance))}
    return {**numbers, "score": found.scores[0].score(), "digests": digests}


def parse(argv=None):
    parser = argparse.ArgumentParser()
    add = functools.partial(parser.add_argument, type=int)
    parser.add_argument("--cache")
    parser.add_argument("--out")
    parser.add_argument("--coordinator")
    for name in ("num_processes", "process_id"):
        add(f"--{name}")
    for name, default in (("num_images", 500), ("batch_size", 8), ("side", 16), ("num_features", 16), ("block", 24)):
        add(f"--{name}", default=default)
    return parser.parse_args(argv)


def main():
    args = parse()
    hosts.join(args.coordinator, args.num_processes, args.process_id)
    store.BLOCK = args.block
    record = summary(extract(args))
    record["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_json(f"{args.out}.{jax.process_index()}", record)


if __name__ == "__main__":
    main()
