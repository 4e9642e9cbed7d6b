"""Measure speed: sampling, decoding, training, codebook search, data, features. The last line of stdout is JSON.

python benchmark.py sample --model=huge --batch=1,100,200 --against=16x16x1
python benchmark.py train --stage=2 --preset=imagenet256_480m
python benchmark.py compile --target=h100:8 --stage=2 --preset=imagenet256_1400m --mesh=1x8x1

A list of batches, presets, meshes and the like makes a sweep.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

from benchmarks import features, preflight, quantize, roofline, sample, sweep, targets, train
from rq_jax.training import cli

COMMANDS = {
    "sample": sweep.Benchmark(sample.groups, sample.build, "image"),
    "decode": sweep.Benchmark(sample.decode_groups, sample.build_decode, "image"),
    "quantize": sweep.Benchmark(quantize.groups, quantize.build, "vector"),
    "train": sweep.Benchmark(train.groups, train.build, "image"),
    "data": sweep.Benchmark(train.data_groups, train.build_data, "image"),
    "features": sweep.Benchmark(features.groups, features.build, "image"),
}


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, at least 1")
    return int(text)


def _code_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no code shape; give height x width x depth, such as 8x8x4")
    return tuple(map(int, text.split("x")))


def _one_of(*allowed: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        named = {str(value): value for value in allowed}
        if text not in named:
            raise argparse.ArgumentTypeError(f"'{text}' is unknown; allowed are {', '.join(named)}")
        return named[text]

    return parse


DTYPES = _list(_one_of("float32", "bfloat16"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    options = {
        "sample": (add_sample, "draw code grids of random weights, by class"),
        "decode": (add_decode, "decode code grids to 8-bit images"),
        "quantize": (add_quantize, "codebook search and update, against the whole matrix of distances and its argmin"),
        "train": (add_train, "the training step of either stage"),
        "data": (add_data, "read and transform training images, without a model"),
        "features": (add_features, "features of images, by which sets are measured and samples are judged"),
        "compile": (add_compile, "what a program needs on devices that are not here, as their compiler plans it"),
    }
    for name, (add_options, text) in options.items():
        add = commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument
        add_options(add)
        if name == "compile":
            continue
        add("--runs", type=_count, default=5, help="timed runs of each configuration; the table shows their median")
        add("--warmups", type=_count, default=1, help="runs before them")
        add("--out", type=cli.path, help="JSON file of the record")
        add("--save", action="store_true", help="without --out: benchmarks/results/<device>-<date>-<commit>.json")
        add("--compare", type=cli.path, help="JSON file of an earlier run: ratios new / old of what both measured")
    return parser.parse_args(argv)


def add_shapes(add: Callable[..., Any]) -> None:
    add("--batch", type=_list(_count), default=[1, 8], help="images of one program")
    add("--downsampling", type=_list(_one_of(*sample.TOKENIZERS)), help="of 256x256 images (default: 32)")
    add("--depth", type=_list(_count), help="codes of a position, with --downsampling (default: 4)")
    add("--code_shape", type=_list(_code_shape), help="in place of the two, such as 8x8x4,16x16x1")
    add("--codebook_size", type=_list(_count), help="default: 16384")
    add("--tokenizer", help="preset of configs/rqvae.py, or dqvae:<preset> (default: by downsampling)")
    add("--plot", type=cli.path, help="PNG file: images a second by batch")


def add_sample(add: Callable[..., Any]) -> None:
    names = *sample.MODELS, *sample.GRAINED
    add("--model", type=_list(_one_of(*names)), default=["tiny"], help=", ".join(names))
    add_shapes(add)
    add("--against", type=_list(_code_shape), default=[], help="code shapes to measure beside each, at equal layers")
    add("--dtype", type=DTYPES, help="of the computation (default: float32 on CPUs, else bfloat16)")
    add("--weights", type=_list(_one_of(*roofline.BYTES)), help="weights at rest (default: as --dtype)")
    ratios = f"share of the regions of the finest grain, of models with grains (default: {sample.FINE_RATIO})"
    add("--fine_ratio", type=_list(float), help=ratios)
    add("--as_released", action="store_true", help="beside each the original's sampler, which caches nothing")
    add("--guidance", type=float, help="scale of classifier-free guidance")
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=_count)
    add("--top_p", type=float)
    add("--decode", action="store_true", help="also decode to 8-bit images, while the next batch is drawn")
    add("--batches", type=_count, help="of one run (default: 1, with --decode 2)")
    add("--protocol", type=_one_of("paper"), help="ceil(1000 / batch) batches a run, sampling and decoding apart")


def add_decode(add: Callable[..., Any]) -> None:
    add_shapes(add)
    add("--dtype", type=DTYPES, help="of the computation (default: float32 on CPUs, else bfloat16)")


def add_quantize(add: Callable[..., Any]) -> None:
    add("--num_vectors", type=_list(_count), default=[8192])
    add("--code_dim", type=_list(_count), default=[256])
    add("--codebook_size", type=_list(_count), default=[16384])
    add("--depth", type=_list(_count), default=[4])


def add_preset(add: Callable[..., Any]) -> None:
    add("--stage", type=_one_of(1, 2), default=1)
    add(
        "--preset",
        type=_list(str),
        default=["demo"],
        help="of configs/rqvae.py or configs/rqtransformer.py, or dqvae:<preset>",
    )
    add("--quicktest", action="store_true", help="the preset, shrunk to small networks and images")
    add("--batch", type=_list(_count), help="default: the preset's")
    add("--steps", type=_count, default=10, help="batches of one run")


def add_train(add: Callable[..., Any]) -> None:
    add_preset(add)
    add("--accumulation_steps", type=_count, help="micro-batches of stage 2 (default: the preset's)")
    add("--dtype", type=DTYPES, help="default: the preset's")
    sources = "random images, the preset's, or for models with grains codes whose lengths spread as the bundled set's"
    add("--data", type=_one_of("synthetic", "preset", "codes"), default="synthetic", help=sources)
    add("--buckets", type=_list(_count), help="numbers of tokens that batches are padded to, beside the same without")
    add("--window", type=_count, default=1, help="batches among which images are grouped by length, with --buckets")
    add("--no_perceptual", action="store_true", help="stage 1 without the perceptual loss")
    add("--no_adversary", action="store_true", help="stage 1 without the discriminator")


def add_data(add: Callable[..., Any]) -> None:
    add_preset(add)
    add("--num_threads", type=_list(_count), help="default: the preset's")
    add("--data_name", help="data set (default: the preset's)")
    add("--data_dir", type=cli.path, help="its directory")
    add("--jpeg_side", type=_count, help="read JPEGs of this side in place of a data set, such as 256")


def add_features(add: Callable[..., Any]) -> None:
    add("--net", type=_list(_one_of(*features.NETS)), default=[*features.NETS], help=", ".join(features.NETS))
    add("--image_size", type=_list(_count), default=[256], help="side of the images")
    add("--batch", type=_list(_count), default=[64], help="images over all devices")


def add_compile(add: Callable[..., Any]) -> None:
    add(
        "--target",
        type=targets.checked_name,
        required=True,
        help="devices: h100:8, h200:8, a100:2x8, v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8",
    )
    add("--stage", type=_one_of(*preflight.STAGES), default="2", help="what is compiled: 1, 2, sample or decode")
    add(
        "--preset",
        type=_list(str),
        required=True,
        help="of configs/rqvae.py or configs/rqtransformer.py, or dqvae:<preset>",
    )
    add("--quicktest", action="store_true", help="the preset, shrunk to small networks and images")
    add(
        "--mesh", type=_list(preflight.mesh_sizes), help="data x fsdp x tensor, such as 1x8x1 (default: all along data)"
    )
    add("--batch", type=_list(_count), help="images over all devices (default: the preset's; 100 of sample and decode)")
    add("--accumulation_steps", type=_count, help="micro-batches of stage 2 (default: the preset's)")
    add("--gradients", type=_one_of("whole", "sharded"), help="of micro-batches, along fsdp (default: the preset's)")
    add("--remat", type=_one_of("on", "off"), help="recomputation of activations (default: the preset's)")
    add("--weights", type=_one_of(*roofline.BYTES), help="weights at rest, of the sampler (default: bfloat16)")
    add(
        "--fits",
        action="store_true",
        help="look for the micro-batches, recomputation and mesh that fit and are fastest",
    )
    add("--out", type=cli.path, help="JSON file of the record")


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        args = parse_args()
        if args.command == "compile":
            preflight.run(args)
            return
        cli.find_devices()
        sweep.run(COMMANDS[args.command], args)


if __name__ == "__main__":
    main()
