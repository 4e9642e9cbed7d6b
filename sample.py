"""Draw pictures: checkpoint -> codes -> images, a labelled grid, the codes and the settings.

python sample.py --checkpoint=runs/rqtransformer --out=samples --num_images=36 --batch_size=36 [--classes=0,3,flags]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import checkpoint, sampling
from rq_jax.report import grids
from rq_jax.report.progress import Progress
from rq_jax.samples import read_codes
from rq_jax.training import cli

SHIPPED = Path(__file__).parent / "checkpoints" / "emoji"
NUM_IN_GRID = 100
# Of the config section `data`: what decides which pictures there are, and their classes.
DATA_SETTINGS = (
    "name", "data_dir", "train_split", "validation_split", "label_key", "eval_transform", "image_size", "channels",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, as for every other mistake


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--checkpoint",
        default=str(SHIPPED),
        help="run or model directory of stage 2 (default: the pair that ships)",
    )
    add("--out", required=True, help="directory of the results")
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    add("--num_images", type=int, default=36)
    add("--batch_size", type=int, default=36, help="images of one compiled program")
    add(
        "--first_index",
        type=int,
        default=0,
        help="id of the first image; several hosts take slices of one run",
    )
    add("--seed", type=int, default=0, help="an image depends on the seed and its id alone")
    add(
        "--classes",
        help="numbers or names, separated by commas; image i takes the i-th in turn (default: those of --prefix, else "
        "drawn as often as the training set has them, where the checkpoint tells, else all in turn)",
    )
    add(
        "--classes_of",
        help="train, validation or a split's own name: image i takes the class of its i-th picture, in turn",
    )
    add("--prompt", action="append", help="a text, given once or more; image i takes the i-th in turn")
    add("--prefix", help="codes.npz of an earlier run whose first positions are kept, image by image")
    add(
        "--prefix_positions",
        type=int,
        default=0,
        help="how many positions of --prefix are kept, in raster order",
    )
    add(
        "--temperature",
        type=_numbers(float),
        help="one value, or one per depth separated by commas; 0 is greedy",
    )
    add("--top_k", type=_numbers(int), help="as --temperature; default of all four: the checkpoint's config")
    add("--top_p", type=_numbers(float), help="as --temperature")
    add("--guidance", type=float, help="scale of classifier-free guidance, for models trained with it")
    add(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        help="of the transformer, at rest in memory (default: bfloat16 on an accelerator, float32 on CPU)",
    )
    add(
        "--neighbours",
        type=int,
        default=0,
        help="also show this many nearest training pictures beside 12 samples",
    )
    return parser.parse_args(argv)


def _numbers(kind: type):
    def parse(text: str):
        values = [kind(part) for part in text.split(",")]
        return values[0] if len(values) == 1 else values

    return parse


def conditions(
    loaded: checkpoint.LoadedModel, args: argparse.Namespace, carried: np.ndarray | None = None
) -> tuple[np.ndarray | None, list[str]]:
    """The conditions (n, U) that the images take in turn, and what they are called; `carried` are those of --prefix.

    Raises:
      ValueError: classes or prompts that the model does not take, or does not know.
    """
    model, names = loaded.model, loaded.config.get("class_names")
    kind = "unconditional" if not model.is_conditional else "class" if model.cond_length == 1 else "text"
    flags = (
        ("--classes", args.classes, "class"),
        ("--classes_of", args.classes_of, "class"),
        ("--prompt", args.prompt, "text"),
    )
    for flag, value, wanted in flags:
        if value and kind != wanted:
            raise ValueError(f"{flag}: {value} is for a {wanted}-conditional model, this one is {kind}; leave it out")
    if kind == "unconditional":
        return None, [""]
    if kind == "text":
        from rq_jax.data import load_tokenizer

        if not args.prompt:
            raise ValueError("--prompt: missing, this model draws pictures of a text; give one or more")
        tokenizer = load_tokenizer(Path(args.checkpoint) / "text_tokenizer.json", model.cond_length)
        return tokenizer(args.prompt), args.prompt
    V = model.cond_vocab_size
    names = names or [str(i) for i in range(V)]
    if args.classes_of:
        chosen = _labels(loaded.config, args.classes_of)
    elif args.classes:
        chosen = [_class_number(text.strip(), names) for text in args.classes.split(",")]
    elif carried is not None:
        chosen = carried.flatten().tolist()
        if len(chosen) != len(carried) or not all(0 <= number < V for number in chosen):
            raise ValueError(f"--prefix: '{args.prefix}' holds no classes 0..{V - 1}; give --classes")
    elif counts := loaded.config.get("class_counts"):
        chosen = _draw_classes(counts, args)
    else:
        chosen = range(V)
    return np.array(chosen)[:, None], [names[i] for i in chosen]


def _draw_classes(counts: list[int], args: argparse.Namespace) -> list[int]:
    """Classes of all image ids up to the last, drawn by frequency: that of an id depends on the seed alone."""
    rng = np.random.default_rng(args.seed)
    return rng.choice(len(counts), args.first_index + args.num_images, p=np.divide(counts, sum(counts))).tolist()


def _labels(config: dict[str, Any], split: str) -> list[int]:
    """Labels of a split of the data set that the model was trained on, in order."""
    data = config.get("data") or {}
    if not data.get("name") or not data.get("label_key"):
        raise ValueError(f"--classes_of: {split} needs the data set of the model, which names none; give --classes")
    batches = _open_split(config, split).iterator()
    return [int(label) for batch in batches for label in batch["label"][batch["mask"]]]


def _open_split(config: dict[str, Any], split: str) -> Any:
    """A split of the data set that the model was trained on, once through."""
    from rq_jax.data import make_dataset

    settings = {name: value for name, value in config["data"].items() if name in DATA_SETTINGS}
    return make_dataset(**settings, split=split, train=False, batch_size=256)


def _class_number(text: str, names: list[str]) -> int:
    lower = [name.lower() for name in names]
    number = lower.index(text.lower()) if text.lower() in lower else int(text) if text.isdigit() else -1
    if not 0 <= number < len(names):
        raise ValueError(f"--classes: '{text}' is no class; allowed are 0..{len(names) - 1} and {', '.join(names)}")
    return number


def check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range; settle what depends on the device."""
    args.weights = args.weights or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: {getattr(args, name)} must be at least 1")
    for name in ("first_index", "seed", "prefix_positions", "neighbours"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: {getattr(args, name)} must be at least 0")
    if args.classes and args.classes_of:
        raise ValueError(f"--classes: {args.classes} and --classes_of: {args.classes_of} exclude one another")
    if bool(args.prefix) != bool(args.prefix_positions):
        raise ValueError(f"--prefix: {args.prefix} and --prefix_positions: {args.prefix_positions} belong together")


def draw(
    loaded: checkpoint.LoadedModel,
    args: argparse.Namespace,
    settings: dict[str, Any],
    conds: np.ndarray | None,
    prefix: np.ndarray | None,
) -> Iterator:
    """Yields (image ids, codes, uint8 images) batch by batch; while one is fetched the next is already drawn."""
    model, tokenizer = loaded.model, loaded.tokenizer
    variables = jax.jit(model.for_inference, static_argnums=1)(loaded.variables, args.weights)
    # Pictures are rounded to 8 bits: on an accelerator the decoder computes in bfloat16, with a float32 quantiser.
    decoder = tokenizer.model if jax.default_backend() == "cpu" else tokenizer.model.clone(dtype="bfloat16")
    decoder_variables = jax.device_put(tokenizer.variables)
    rng, last, pending = jax.random.key(args.seed), args.first_index + args.num_images, None

    @jax.jit
    def decode(variables, codes):
        images = decoder.apply(variables, codes, method="decode_codes").astype(jnp.float32)
        return jnp.round(jnp.clip(0.5 * images + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def fetch(ids, codes, images):
        real = ids < last
        return ids[real], np.asarray(codes)[real], np.asarray(images)[real]

    for first in range(args.first_index, last, args.batch_size):
        # A last batch that is not full draws images nobody asked for, so that nothing is compiled twice.
        ids = np.arange(first, first + args.batch_size)
        codes = sampling.generate(
            model, variables, rng, args.batch_size,
            None if conds is None else conds[ids % len(conds)],
            image_ids=ids, prefix=None if prefix is None else prefix[ids % len(prefix)], **settings,
        )  # fmt: skip
        batch = ids, codes, decode(decoder_variables, codes)
        if pending is not None:
            yield fetch(*pending)
        pending = batch
    yield fetch(*pending)


def neighbour_sheet(loaded: checkpoint.LoadedModel, images: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Samples beside the training pictures nearest to them in mean squared pixel distance."""
    batches = _open_split(loaded.config, "train").iterator()
    training = np.concatenate([grids.to_uint8(batch["image"][batch["mask"]]) for batch in batches])
    columns = []
    for image in images:
        distances = np.mean((training.astype(np.float32) - image.astype(np.float32)) ** 2, axis=(1, 2, 3))
        columns.append(training[np.argsort(distances, kind="stable")[:num_neighbours]])
    rows = {"sample": images}
    for i in range(min(num_neighbours, len(training))):
        rows[f"nearest {i + 1}"] = np.stack([column[i] for column in columns])
    return grids.labelled_grid(rows, scale=max(1, 64 // images.shape[1]))


def run(args: argparse.Namespace) -> Path:
    """Draw and write everything.

    Returns:
      The labelled grid's path.

    Raises:
      ValueError, FileNotFoundError: bad arguments or checkpoint, before anything compiles.
    """
    check(args)
    loaded = checkpoint.load_model(args.checkpoint, step=args.step, ema=not args.no_ema)
    if loaded.tokenizer is None:
        raise ValueError(f"--checkpoint: '{args.checkpoint}' carries no tokenizer; give the directory of a stage-2 run")
    if args.neighbours and not (loaded.config.get("data") or {}).get("name"):
        raise ValueError(
            f"--neighbours: {args.neighbours} needs the training pictures, this model names none; leave it out"
        )
    prefix, carried = read_codes(args.prefix, args.prefix_positions) if args.prefix else (None, None)
    conds, names = conditions(loaded, args, carried)
    settings = dict(loaded.config.get("sample", {}))
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    settings |= {name: value for name, value in given.items() if value is not None}
    sampling.check_filter(*(settings.get(name) for name in ("temperature", "top_k", "top_p")))
    sampling.check_guidance(loaded.model, settings.get("guidance"))
    out, tag = Path(args.out), f"{args.first_index:06d}"
    shown, all_codes = [], []
    with Progress(args.num_images, unit="image", title="sampling") as progress:
        for ids, codes, images in draw(loaded, args, settings, conds, prefix):
            for image_id, image in zip(ids, images, strict=True):
                grids.save_png(out / "images" / f"{image_id:06d}.png", image)
            shown += list(images[: max(0, NUM_IN_GRID - len(shown))])
            all_codes.append(codes)
            progress.update(len(ids))
    ids = np.arange(args.first_index, args.first_index + args.num_images)
    cond = {} if conds is None else {"cond": conds[ids % len(conds)]}
    np.savez(out / f"codes_{tag}.npz", codes=np.concatenate(all_codes), image_ids=ids, **cond)
    captions = [names[i % len(names)] for i in ids[: len(shown)]]
    scale = max(1, 64 // shown[0].shape[0])
    grid = out / f"grid_{tag}.png"
    grids.save_png(grid, grids.captioned_grid(np.stack(shown), captions, columns=10, scale=scale))
    drawn_from = {"transformer": loaded.variables, "tokenizer": loaded.tokenizer.variables}
    record = {**vars(args), **settings, **{name: checkpoint.fingerprint(tree) for name, tree in drawn_from.items()}}
    (out / f"settings_{tag}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"samples: {grid}")
    if args.neighbours:
        sheet = out / f"neighbours_{tag}.png"
        grids.save_png(sheet, neighbour_sheet(loaded, np.stack(shown[:12]), args.neighbours))
        print(f"nearest training pictures: {sheet}")
    return grid


def main() -> None:
    """Command line."""
    cli.keep_compiled_programs()
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
