"""Convert: a published PyTorch checkpoint -> a model directory of ours, and back.

python convert_torch.py --config=config.yaml --state=model.pt --out=vae [--tokenizer=<converted stage 1>, for stage 2]
python convert_torch.py --export=vae --out=vae.safetensors
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import checkpoint, models
from rq_jax.interop import official, state_file
from rq_jax.training import cli

STAGE2, DISCRIMINATOR, TEXT_TOKENIZER = "rqtransformer", "discriminator", "text_tokenizer.json"


logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, as for every other mistake


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: flags that do not belong together, or one that is missing.
    """
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", help="official config, yaml or json, as it came with the checkpoint")
    add("--state", help="official weights: .pt, .pth, .ckpt, .npz or .safetensors")
    add("--tokenizer", help="stage 2 only: directory of its tokenizer, converted or trained here")
    add("--text_tokenizer", help="text models only: the official *-vocab.json, its *-merges.txt beside it")
    add("--ema", action="store_true", help="the averaged weights, state_dict_ema")
    add("--export", help="the way back: a run or model directory of ours")
    add("--out", required=True, help="new model directory; with --export a new .safetensors file")
    args = parser.parse_args(argv)
    wanted, others = ("config", "state"), ("tokenizer", "text_tokenizer", "ema")
    if args.export:
        for name in (*wanted, *others):
            if getattr(args, name):
                raise ValueError(f"--{name}: {getattr(args, name)} is not for --export; leave it out")
    for name in wanted:
        if not args.export and not getattr(args, name):
            raise ValueError(f"--{name}: missing; give --config and --state of a checkpoint, or --export")
    return args


# --- what is written, whole or not at all -------------------------------------------------------------------


@contextlib.contextmanager
def whole(out: str | os.PathLike) -> Iterator[Path]:
    """A new directory that becomes `out` where all goes well, and of which nothing stays otherwise."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: '{out}' is there already; give the name of a new directory")
    parent = next(parent for parent in out.parents if parent.is_dir())
    partial = parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir()
        yield partial
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- from the original --------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """A model of ours and where it came from; `tensors` is how many official ones were read."""

    config: dict[str, Any]
    variables: dict[str, Any]
    tensors: int
    dropped: list[str]


def convert(kind: official.Kind, state: Mapping[str, Any], settings: dict[str, Any]) -> Converted:
    """Variables and config of one model.

    Args:
      kind: of the official checkpoint.
      state: its tensors.
      settings: of our model, from `kind.settings`.

    Raises:
      ValueError: settings that do not fit together, or a state dict that does not fit them.
    """
    models.create(kind.model, **settings)  # refuses what does not fit before anything is read
    table = kind.table(settings)
    unread = [name for name in table.unread if name in state]
    config = {"model": {"name": kind.model, **settings}}
    return Converted(config, kind.variables(state, settings), len(table.official_shapes()), unread)


def import_checkpoint(args: argparse.Namespace) -> None:
    """Convert one official checkpoint and print what was done.

    Raises:
      ValueError, FileNotFoundError: files that are missing, damaged, or do not fit together; nothing is left behind.
    """
    config = state_file.read_config(args.config)
    kind = official.find_kind(config)
    for name in ("tokenizer", "text_tokenizer"):
        if getattr(args, name) and kind != STAGE2:
            raise ValueError(f"--{name}: {getattr(args, name)} is for stage 2, and this is a config of '{kind}'")
    if args.text_tokenizer and not args.tokenizer:
        raise ValueError(f"--text_tokenizer: {args.text_tokenizer} needs --tokenizer beside it; give both")
    with whole(args.out) as partial:
        # What the configs refuse they refuse before the weights are read.
        pair = bind_tokenizer(partial, config, args) if args.tokenizer else None
        settings = pair.settings if pair else official.KINDS[kind].settings(config)
        file = official.unpack(state_file.read_state(args.state), kind, args.ema)
        main = convert(official.KINDS[kind], file.state, settings)
        if pair:
            main.config.update(pair.sections)
        if kind == STAGE2:
            model = models.create(**main.config["model"])
            if model.uses_codebook:
                main.variables["codebook"] = {"codebook_KE": pair.codebook} if pair else unknown_codebook(model)
        written, dropped = {".": main}, file.dropped
        if file.discriminator is not None and not official.has_discriminator(config):
            dropped = [*dropped, f"{DISCRIMINATOR} (the config does not describe it)"]
        elif file.discriminator is not None:
            settings = official.discriminator_settings(config)
            written[DISCRIMINATOR] = convert(official.KINDS[DISCRIMINATOR], file.discriminator, settings)
        for name, model in written.items():
            checkpoint.save_model(partial / name, model.config, model.variables)
    report(written, dropped, args, kind)


class Pair(NamedTuple):
    """What the tokenizer says of its transformer, whose codebook it has, and sections of a config for sampling."""

    settings: dict[str, Any]
    sections: dict[str, Any]
    codebook: Any


def bind_tokenizer(directory: Path, config: Mapping[str, Any], args: argparse.Namespace) -> Pair:
    """Put the tokenizer, and that of the text where one is given, into a stage-2 directory.

    Raises:
      ValueError, FileNotFoundError: no tokenizer, or one that is of another pair.
    """
    tokenizer = checkpoint.load_tokenizer(args.tokenizer)
    theirs = settings_of(tokenizer.model)
    settings = official.rqtransformer_settings(config, theirs)
    if args.text_tokenizer:
        copy_text_tokenizer(args.text_tokenizer, settings, directory)
    checkpoint.bind_tokenizer(directory, tokenizer)
    data = {"name": "folder", "data_dir": None, "image_size": theirs["image_size"], "channels": theirs["in_channels"]}
    sections = {"data": data, "sample": official.sample_settings(config)}
    return Pair(settings, sections, tokenizer.variables["codebook"]["codebook_KE"])


def unknown_codebook(model: Any) -> dict[str, Any]:
    """The codebook of a transformer without its tokenizer: NaN, as in a fresh one, so that nobody overlooks it."""
    logger.warning(
        "--tokenizer: not given; the codebook, which is the tokenizer's, is NaN and the directory makes no pictures; "
        "convert the stage 1 of its pair first and give that directory"
    )
    shapes = models.abstract_variables(model)["codebook"]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)


def settings_of(model: Any) -> dict[str, Any]:
    """All settings of a model, defaults included."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    return {name: getattr(model, name) for name in names}


def copy_text_tokenizer(path: str, settings: Mapping[str, Any], directory: Path) -> None:
    """Put the text tokenizer of a text-conditional model into its directory.

    Raises:
      ValueError: the model takes no text, or other tokens.
    """
    from rq_jax.data import load_tokenizer

    length, size = settings["cond_length"], settings["cond_vocab_size"]
    if length == 1:
        raise ValueError(f"--text_tokenizer: '{path}' is for models of text, this one takes none; leave it out")
    tokenizer = load_tokenizer(path, length)
    if tokenizer.vocab_size > size:
        raise ValueError(f"--text_tokenizer: '{path}' has {tokenizer.vocab_size} ids, the model {size}; give its own")
    tokenizer.save(directory / TEXT_TOKENIZER)


def report(written: Mapping[str, Converted], dropped: list[str], args: argparse.Namespace, kind: str) -> None:
    """Print what was read, what was left out, what was written, and what to do with it."""
    for name, model in written.items():
        numbers = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in model.variables.items()}
        others = "".join(f", {part} {count:,}" for part, count in numbers.items() if part != "params")
        print(
            f"{model.config['model']['name']}: {model.tensors} tensors, {numbers['params']:,} parameters{others}; "
            f"fingerprint {checkpoint.fingerprint(model.variables)}; written to {Path(args.out) / name}"
        )
        dropped = [*dropped, *(tensor if name == "." else f"{name}.{tensor}" for tensor in model.dropped)]
    print(f"dropped on purpose: {', '.join(dropped) or 'nothing'}")
    print(f"next: {next_command(written['.'].config['model'], kind, args)}")


def next_command(model: Mapping[str, Any], kind: str, args: argparse.Namespace) -> str:
    """What a converted model is good for."""
    if kind == DISCRIMINATOR:
        return f"put it beside its tokenizer as <directory>/{DISCRIMINATOR}, to go on training with it"
    if kind != STAGE2:
        command = "python train_transformer.py --config=configs/rqtransformer.py:<preset> --workdir=<directory>"
        return f"{command} --config.tokenizer={args.out}"
    if not args.tokenizer:
        return "convert it again with --tokenizer, for a model that makes pictures"
    command = f"python sample.py --checkpoint={args.out} --out=samples"
    if model["cond_length"] == 1:
        return command
    missing = f", once it has a {TEXT_TOKENIZER} (--text_tokenizer=<the official *-vocab.json> makes one)"
    return f"{command} --prompt='a red house'{'' if args.text_tokenizer else missing}"


# --- to the original ----------------------------------------------------------------------------------------


def export_model(args: argparse.Namespace) -> None:
    """Write one of our models with official names and layout, its official config beside it.

    Raises:
      ValueError, FileNotFoundError: no model, one that the original cannot express, or files that are there already.
    """
    from safetensors.numpy import save_file

    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: '{out}' must end in .safetensors, which --export writes")
    beside = out.with_suffix(".config.json")
    for path in (out, beside):
        if path.exists():
            raise ValueError(f"--out: '{path}' is there already; give the name of a new file")
    ours = checkpoint.read_config(args.export)
    name, settings = ours["model"]["name"], settings_of(models.create(**ours["model"]))
    config = official.official_config(name, settings, ours.get("sample"))  # refuses before the weights are read
    variables = checkpoint.load_model(args.export).variables
    if name == STAGE2:
        variables.pop("codebook", None)  # the tokenizer's, and exported with it
    state = official.official_state(name, variables, settings)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, partial)
        beside.write_text(json.dumps(config, indent=1) + "\n")
        shutil.copymode(beside, partial)  # safetensors gives its files to their owner alone
        os.replace(partial, out)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        partial.unlink(missing_ok=True)
    print(f"{name}: {len(state)} tensors, {sum(np.size(x) for x in state.values()):,} numbers, written to {out}")
    left_out = official.left_out_settings(name, settings)
    if left_out:
        print(f"not in {beside.name}, which has no word for it: {', '.join(f'{k} {v}' for k, v in left_out.items())}")
    print(f"next: python convert_torch.py --config={beside} --state={out} --out=<directory> brings it back")


def main() -> None:
    """Command line."""
    jax.config.update("jax_platforms", "cpu")  # numbers are moved, not computed
    logging.basicConfig(format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is half written is removed
    with cli.one_line_errors(OSError):
        args = parse_args()
        export_model(args) if args.export else import_checkpoint(args)


if __name__ == "__main__":
    main()
