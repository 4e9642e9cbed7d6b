"""Convert: a published PyTorch checkpoint -> a model directory of ours, and back.

python convert_torch.py --config=config.yaml --state=model.pt --out=vae [--tokenizer=<converted stage 1>, for stage 2]
python convert_torch.py --export=vae --out=vae.safetensors
"""

import argparse
import functools
import logging
import os
import signal
import sys

import jax

from rq_jax.checkpoint import TEXT_TOKENIZER
from rq_jax.grains import ENTROPY_BINS
from rq_jax.interop import convert, export, official
from rq_jax.training import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: flags that do not belong together, or one that is missing.
    """
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_path = functools.partial(add, type=cli.path)
    add_path("--config", help="official config, yaml or json, as it came with the checkpoint")
    add_path("--state", help="official weights: .pt, .pth, .ckpt, .npz or .safetensors")
    tokenizer = "stage 2 only: directory of its tokenizer, converted or trained here, or hf://owner/name"
    add("--tokenizer", type=cli.model_path, help=tokenizer)
    add(
        "--text_tokenizer",
        type=cli.path,
        help="text models only: the official *-vocab.json, its *-merges.txt beside it",
    )
    add_path(
        "--thresholds",
        help="DQ-VAE by entropy only: its thresholds; default: the file that the config names, beside it",
    )
    add(
        "--entropy_bins",
        choices=tuple(ENTROPY_BINS),
        help="the same: full, or legacy for what was trained before July 2023, as the released one",
    )
    add("--ema", action="store_true", help="the averaged weights, such as state_dict_ema")
    add("--key", help="where the weights stand in the file, such as generator.state_dict; needed where several fit")
    add("--export", type=cli.model_path, help="the way back: a run or model directory of ours, or hf://owner/name")
    add_path("--out", required=True, help="new model directory; with --export a new .safetensors file")
    args = parser.parse_args(argv)
    required = ("config", "state")
    for name in (*required, "tokenizer", "text_tokenizer", "thresholds", "entropy_bins", "ema", "key"):
        if args.export and getattr(args, name):
            raise ValueError(f"--{name}: {getattr(args, name)} is not for --export; leave it out")
    for name in required:
        if not args.export and not getattr(args, name):
            raise ValueError(f"--{name}: missing; give --config and --state of a checkpoint, or --export")
    return args


def run(args: argparse.Namespace) -> None:
    """Convert or export, and print what was done."""
    if args.export:
        exported = export.export_model(args.export, args.out)
        amount = f"{exported.num_tensors} tensors, {exported.num_values:,} numbers"
        lines = [f"{exported.name}: {amount}, written to {exported.weights_path}"]
        if exported.left_out:
            settings = ", ".join(f"{name} {value}" for name, value in exported.left_out.items())
            lines.append(f"not in {exported.config_path.name}, which has no word for it: {settings}")
        back = f"--config={exported.config_path} --state={exported.weights_path} --out=<directory>"
        tell([*lines, f"next: python convert_torch.py {back} brings it back"])
        return
    conversion = convert.convert_checkpoint(
        args.config,
        args.state,
        args.out,
        tokenizer=args.tokenizer,
        text_tokenizer=args.text_tokenizer,
        thresholds=args.thresholds,
        entropy_bins=args.entropy_bins,
        use_ema=args.ema,
        key=args.key,
    )
    tell([*convert.report(conversion, args.out), f"next: {next_command(conversion, args)}"])


def tell(lines: list[str]) -> None:
    """Print what was done; the work is in place, and an output that does not take the lines undoes none of it."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        logging.getLogger(__name__).warning("the report could not be printed: %s", error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it goes there at the end


def next_command(conversion: convert.Conversion, args: argparse.Namespace) -> str:
    """The command, or the advice, that follows a conversion."""
    if conversion.kind == convert.DISCRIMINATOR:
        return f"put it beside its tokenizer as <directory>/{convert.DISCRIMINATOR}, to go on training with it"
    name = conversion.models["."].config["model"]["name"]
    if transformers := [kind.model for kind in official.KINDS.values() if kind.tokenizer == name]:
        command = f"python train_transformer.py --config=configs/{transformers[0]}.py:<preset> --workdir=<directory>"
        return f"{command} --config.tokenizer={args.out}"
    if not args.tokenizer and convert.TOKENIZER not in conversion.models:
        return "convert it again with --tokenizer, for a model that makes images"
    command = f"python sample.py --checkpoint={args.out} --out=samples"
    if conversion.models["."].config["model"].get("cond_length", 1) == 1:
        return command
    missing = f", once it has a {TEXT_TOKENIZER} (--text_tokenizer=<the official *-vocab.json> makes one)"
    return f"{command} --prompt='a red house'{'' if args.text_tokenizer else missing}"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    jax.config.update("jax_platforms", "cpu")  # numbers are moved, not computed
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # half a directory is removed
    from safetensors import SafetensorError  # a full disk is one of these

    with cli.one_line_errors(SafetensorError):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
