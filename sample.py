"""Draw images: a labelled grid, each image, its codes, and the settings.

python sample.py --out=samples [--checkpoint=runs/rqtransformer] --num_images=36 --batch_size=36 [--classes=0,3,flags]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.evaluation import choices, drawing, edits, neighbours
from rq_jax.evaluation.conditions import choose_conditions, class_names, kind_of, read_prompts
from rq_jax.evaluation.drawing import Drawn, Plan
from rq_jax.evaluation.grain_maps import grains_of
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, trained_on
from rq_jax.evaluation.samples import first_codes, read_draws
from rq_jax.files import atomic_path, write_json
from rq_jax.grains import GrainedCodes
from rq_jax.report import grain_maps, grids
from rq_jax.sampling import edit
from rq_jax.sampling.images import DECODED_PER_DEVICE, LAST_ID, draw_settings
from rq_jax.settings import checks
from rq_jax.settings.text import quoted
from rq_jax.training import cli

ROOT = Path(__file__).parent
SHIPPED = ROOT / "checkpoints" / "avatars"
NUM_IMAGES = 36
LONG_CAPTION = 40  # letters; images with longer ones are shown larger, to make room for them
UNRECORDED = ("list_classes", "coordinator", "num_processes", "process_id")  # flags that change no image
FILTER = ("temperature", "top_k", "top_p")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--checkpoint",
        type=cli.model_path,
        default=str(SHIPPED),
        help="run or model directory of stage 2, or hf://owner/name (default: the pair that ships)",
    )
    add("--out", type=cli.path, help="directory of the results")
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    num = f"default: {NUM_IMAGES}, or with --per_prompt all of them, of which fewer are a slice"
    add("--num_images", type=int, help=num)
    size = "images drawn at a time by the devices of a process, which share them evenly: rounded up to a multiple"
    add("--batch_size", type=int, default=36, help=size)
    add(
        "--decode_batch_size",
        type=int,
        help=f"images decoded at a time, at most (default: {DECODED_PER_DEVICE} a device)",
    )
    add("--first_index", type=int, default=0, help="id of the first image: a run may be drawn in slices")
    add("--seed", type=int, default=0, help="an image depends on the seed and its id alone")
    classes = (
        "names or numbers, separated by commas; image i takes the i-th in turn. A name goes before a number, and "
        "stands in double quotes where it holds a comma: --classes='\"tench, Tinca tinca\",3' (default: those of "
        "given codes, else as frequent as in the training set, if the checkpoint records that, else all in turn)"
    )
    add("--classes", help=classes)
    add("--list_classes", action="store_true", help="print the numbers and names of all classes, and draw nothing")
    split = "train, validation or a split's own name: image i takes the class of its i-th image, in turn"
    add("--classes_of", help=split)
    add("--prompt", action="append", help="a text, given once or more; image i takes the i-th in turn")
    add("--prompts", type=cli.path, help="texts of a file instead: a line each of a .txt, or a list in a .json")
    add("--prompts_of", help="train, validation or a split's own name: image i takes the caption of its i-th image")
    add("--per_prompt", type=int, help="images of each prompt")
    add("--prefix", type=cli.path, help="codes.npz of an earlier run whose first positions are kept, image by image")
    order = "how many positions of --prefix are kept, in raster order; of a model with grains, how many codes"
    add("--prefix_positions", type=int, default=0, help=order)
    _add_edit_flags(add)
    add("--temperature", type=cli.per_depth(float), help="one value, or one per depth separated by commas; 0 is greedy")
    add("--top_k", type=cli.per_depth(int), help="as --temperature; default of all four: the checkpoint's config")
    add("--top_p", type=cli.per_depth(float), help="as --temperature")
    add("--position_temperature", type=float, help="of positions, in models with grains (default: that of the codes)")
    add("--position_top_k", type=int, help="the same")
    add("--position_top_p", type=float, help="the same")
    grains = (
        "draw with these grain maps, in turn: a codes .npz of an earlier run, or train, validation or a split's name"
    )
    add("--grains_of", type=cli.path, help=grains)
    add("--guidance", type=float, help="scale of classifier-free guidance, for models trained with it")
    weights = "of the transformer, in memory (default: bfloat16 on an accelerator, float32 on CPU)"
    add("--weights", choices=("float32", "bfloat16", "int8"), help=weights)
    _add_choice_flags(add)
    add("--neighbours", type=int, default=0, help="also show this many nearest training images beside 12 samples")
    cli.add_process_flags(parser)
    return parser.parse_args(argv)


def _add_edit_flags(add: Callable[..., Any]) -> None:
    source = "edit these images, in turn: a codes .npz of an earlier run, or train, validation or a split's name"
    add("--edit_of", type=cli.path, help=source)
    add("--keep_rows", type=int, help="keep so many rows of their codes, from the top, and draw the rest")
    add("--keep_box", type=_box, help="keep top,left,height,width of the code grid")
    before = "what comes before the box in raster order (default: keep)"
    add("--before_box", choices=edit.BEFORE, help=before)
    add("--from_depth", type=int, help="keep so many codes of every position, and draw the finer ones")
    add("--finer_of", type=cli.path, help="take the finer codes of these images instead, given as --edit_of")


def _add_choice_flags(add: Callable[..., Any]) -> None:
    add("--keep", type=float, help="draw more, and keep this share of them: the best of each class or prompt")
    add("--candidates", type=int, help="draw so many for each class or prompt, and keep the best of them")
    add("--by", choices=tuple(choices.JUDGES), help="what judges them: a classifier for classes, CLIP for prompts")
    judge = (
        "its weights: torchvision's ResNet-101 (default: EfficientNet-Lite0), or CLIP ViT-B/32, which has no default"
    )
    add("--judge", type=cli.path, help=judge)


def _box(text: str) -> tuple[int, ...]:
    try:
        top, left, height, width = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no top,left,height,width; give four numbers") from None
    return top, left, height, width


def settle(args: argparse.Namespace) -> None:
    """Fills in what the flags leave open: the prompts of a file, the number of images, the dtype of the weights.

    Raises:
      ValueError, FileNotFoundError: prompts that cannot be read, or that do not fit the number of images.
    """
    args.weights = args.weights or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if args.prompts is not None:
        if args.prompt:
            raise ValueError(f"--prompt: {quoted(args.prompt[0])} and --prompts: {args.prompts} exclude one another")
        args.prompt = read_prompts(args.prompts)
    num_prompts = len(args.prompt or ())
    if args.per_prompt is None:
        args.num_images = NUM_IMAGES if args.num_images is None else args.num_images
        if num_prompts > args.first_index + args.num_images:
            raise ValueError(
                f"--num_images: {args.num_images} are fewer than the {num_prompts} prompts; give more, or --per_prompt"
            )
        return
    checks.at_least("--per_prompt", args.per_prompt, 1)
    if not num_prompts:
        raise ValueError(f"--per_prompt: {args.per_prompt} needs --prompt or --prompts; give some, or --num_images")
    total = num_prompts * args.per_prompt
    args.num_images = total - args.first_index if args.num_images is None else args.num_images
    last = args.first_index + max(args.num_images, 1) - 1
    checks.in_range(
        "--first_index and --num_images: the last image id", last, 0, total - 1, "the images of all prompts"
    )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that are missing, out of range, or exclude each other."""
    if not args.out:
        raise ValueError("--out: missing; give the directory of the results")
    for name in ("num_images", "batch_size", "decode_batch_size"):
        if getattr(args, name) is not None:
            checks.at_least(f"--{name}", getattr(args, name), 1)
    for name in ("first_index", "seed", "prefix_positions", "neighbours"):
        checks.at_least(f"--{name}", getattr(args, name), 0)
    last, both = args.first_index + args.num_images - 1, "--first_index and --num_images: the last image id"
    checks.in_range(both, last, 0, LAST_ID, "the ids that an image can have")
    if args.classes is not None and args.classes_of is not None:
        raise ValueError(f"--classes: {args.classes} and --classes_of: {args.classes_of} exclude one another")
    if args.prompt is not None and args.prompts_of is not None:
        raise ValueError(f"--prompt: {quoted(args.prompt[0])} and --prompts_of: {args.prompts_of} exclude one another")
    if bool(args.prefix) != bool(args.prefix_positions):
        raise ValueError(f"--prefix: {args.prefix} and --prefix_positions: {args.prefix_positions} belong together")
    edit_settings(args).check(args.prefix)
    choice_settings(args).check(prefix=args.prefix, edit_of=args.edit_of)


def choice_settings(args: argparse.Namespace) -> choices.ChoiceSettings:
    """The flags of a choice."""
    return choices.ChoiceSettings(*(getattr(args, name) for name in choices.ChoiceSettings._fields))


def edit_settings(args: argparse.Namespace) -> edits.EditSettings:
    """The flags of an edit."""
    return edits.EditSettings(*(getattr(args, name) for name in edits.EditSettings._fields))


def conditions(
    loaded: checkpoint.LoadedModel, args: argparse.Namespace, carried: np.ndarray | None = None
) -> tuple[np.ndarray | None, list[str]]:
    """The conditions (m, U) that the images take in turn, and their names; `carried` are those of given codes."""
    carrier = f"--prefix: '{args.prefix}'" if args.prefix else f"--edit_of: '{args.edit_of}'"
    return choose_conditions(
        loaded, args.checkpoint, args.first_index + args.num_images, args.seed,
        classes=args.classes, classes_of=args.classes_of, prompts=args.prompt, prompts_of=args.prompts_of,
        carried=carried, carrier=carrier,
    )  # fmt: skip


def load(args: argparse.Namespace) -> checkpoint.LoadedModel:
    """The transformer with its tokenizer.

    Raises:
      ValueError: no tokenizer comes with it, or --neighbours finds no data set.
    """
    loaded = checkpoint.load_model(args.checkpoint, step=args.step, ema=not args.no_ema)
    if loaded.tokenizer is None:
        raise ValueError(f"--checkpoint: '{args.checkpoint}' carries no tokenizer; give the directory of a stage-2 run")
    if args.neighbours and "name" not in trained_on(loaded.config, IMAGE_SETTINGS):
        raise ValueError(
            f"--neighbours: {args.neighbours} needs the training images, this model names none; leave it out"
        )
    return loaded


def plan(args: argparse.Namespace, loaded: checkpoint.LoadedModel) -> Plan:
    """What the flags ask for; those that are wrong are refused before anything compiles."""
    ids = np.arange(args.first_index, args.first_index + args.num_images)
    given = {name: getattr(args, name) for name in (*FILTER, *(f"position_{name}" for name in FILTER), "guidance")}
    settings = draw_settings(loaded.model, loaded.config.get("sample") or {}, given)
    has_own = any(getattr(args, name) is not None for name in ("classes", "classes_of", "prompt", "prompts_of"))
    chosen = conditions(loaded, args) if has_own else None
    edited, earlier, known = None, None, {}
    if args.edit_of:
        edited = edits.prepare(loaded, args.checkpoint, edit_settings(args), ids)
        earlier, known["kept"] = edited.originals, edited.kept
    elif args.prefix:
        earlier = read_draws(args.prefix)
        known["prefix"] = first_codes(earlier, args.prefix_positions, loaded.model)
    conds, names = chosen or conditions(loaded, args, earlier and earlier.conds)
    choice = choices.prepare(loaded, choice_settings(args), ids, conds, names) if args.by else None
    if args.grains_of:
        known["grains"] = grains_of(loaded, args.grains_of, ids)
    return Plan(ids, conds, names, settings, known, edited, choice)


def run(args: argparse.Namespace) -> Path:
    """Draws and writes everything; of several processes each draws a part, and the first writes what is of all.

    Returns:
      The labelled grid's path.

    Raises:
      ValueError, FileNotFoundError: bad arguments or checkpoint, before anything compiles.
    """
    settle(args)
    check(args)
    if args.neighbours and jax.process_count() > 1:  # the others would end while the first compares
        raise ValueError(
            f"--neighbours: {args.neighbours} is for one process, not for {jax.process_count()}; leave it out"
        )
    loaded = load(args)
    planned = plan(args, loaded)
    batches = {name: getattr(args, name) for name in ("batch_size", "decode_batch_size", "seed", "weights")}
    drawn = drawing.draw(loaded, planned, Path(args.out) / "images", **batches)
    if jax.process_index() == 0:
        write(args, loaded, planned, drawn)
    return Path(args.out) / f"grid_{args.first_index:06d}.png"


def write(args: argparse.Namespace, loaded: checkpoint.LoadedModel, planned: Plan, drawn: Drawn) -> None:
    """Writes what is of all images: codes, settings, and the sheets of the first."""
    out, tag, ids, conds = Path(args.out), f"{args.first_index:06d}", planned.ids, planned.conds
    codes, shown = drawn.codes, drawn.shown
    arrays = codes._asdict() if isinstance(codes, GrainedCodes) else {"codes": codes}
    of_images = {} if conds is None else {"cond": conds[ids % len(conds)]}
    if kind_of(loaded) == "text":
        of_images["prompts"] = np.array(planned.captions(len(ids)))
    if drawn.scores is not None:
        of_images["scores"] = drawn.scores
    with atomic_path(out / f"codes_{tag}.npz") as partial, open(partial, "wb") as file:
        np.savez(file, **arrays, image_ids=drawn.ids, **of_images)
    captions = planned.captions(len(shown))
    save_grid(out / f"grid_{tag}.png", shown, captions, arrays.get("grains"), loaded.model)
    drawn_from = {"transformer": loaded.variables, "tokenizer": loaded.tokenizer.variables}
    flags = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    flags |= checkpoint.origin_of(args.checkpoint, ROOT)
    flags["prompt"] = None if args.prompts else args.prompt  # those of a file are beside the codes
    fingerprints = {name: checkpoint.fingerprint(tree) for name, tree in drawn_from.items()}
    chosen = {"chosen": drawn.tally} if drawn.tally else {}
    write_json(out / f"settings_{tag}.json", {**flags, **planned.settings, **fingerprints, **chosen})
    if chosen:
        print("chosen by {judge}: {kept} of {drawn} images".format(**drawn.tally))
    print(f"samples: {out / f'grid_{tag}.png'}")
    if planned.edited:
        sheet = out / f"edit_{tag}.png"
        grids.save_png(sheet, planned.edited.sheet(loaded, ids, shown, captions))
        print(f"edited images: {sheet}")
    if args.neighbours:
        sheet, num = out / f"neighbours_{tag}.png", neighbours.NUM_SHOWN
        grids.save_png(sheet, neighbours.sample_sheet(loaded.config, shown[:num], captions[:num], args.neighbours))
        print(f"nearest training images: {sheet}")


def save_grid(path: Path, images: np.ndarray, captions: list[str], grains: np.ndarray | None, model: Any) -> None:
    """Writes the labelled grid; where there are grains, each image stands beside its grain map."""
    side, lines = (128, 8) if max(map(len, captions)) > LONG_CAPTION else (64, 3)
    scale = max(1, side // images.shape[1])
    if grains is not None:
        grains, G = grains[: len(images)], model.num_grains
        images, captions = grain_maps.pairs(images, captions, grains, G, scale, model.code_shape[-1])
        scale = 1
    grids.save_png(path, grids.captioned_grid(images, captions, columns=10, scale=scale, lines=lines))


def list_classes(args: argparse.Namespace) -> None:
    """Prints the classes of a transformer, a line each: number and name."""
    for number, name in enumerate(class_names(load(args))):
        print(f"{number}  {quoted(name)}")


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        args = parse_args()
        cli.join(args)
        cli.start()
        list_classes(args) if args.list_classes else run(args)


if __name__ == "__main__":
    main()
