"""Programs of a model that run where this package is not: encode, decode and sample, as `jax.export` makes them.

python -m rq_jax.export --checkpoint=runs/rqt --out=exported
python -m rq_jax.export --checkpoint=runs/rqt --out=exported --platforms=cuda --programs=sample --batch_size=64

    encode.jax  decode.jax  sample.jax    computations alone, each for all its platforms
    tokenizer.npz  transformer.npz        weights by name, the first argument of a program
    programs.json                         what each takes and gives, and where the weights come from

Weights are beside the programs, not constants in them: encode and decode share a file, a program stays small whatever
the model, its compiler folds no constants, and who runs it says where the weights lie.
"""

import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from rq_jax import checkpoint, models, sampling
from rq_jax.checkpoint import LoadedModel
from rq_jax.checkpoint.model_dir import named_leaves
from rq_jax.devices import sharding
from rq_jax.files import atomic_path, local_path, read_json, write_atomic, write_json
from rq_jax.grains import GrainedCodes
from rq_jax.sampling import images
from rq_jax.settings import checks
from rq_jax.training import cli


class Kind(NamedTuple):
    """A kind of program: the model whose weights it takes, and the names of its further inputs."""

    part: str
    inputs: tuple[str, ...]


PROGRAMS = {
    "encode": Kind("tokenizer", ("images",)),
    "decode": Kind("tokenizer", ("codes",)),
    "sample": Kind("transformer", ("seed", "image_ids", "cond")),
}
PLATFORMS = ("cpu", "cuda", "tpu")
BATCH_SIZE = 8
RECORD = "programs.json"


def export_programs(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    programs: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    batch_size: int = BATCH_SIZE,
    *,
    step: int | None = None,
    ema: bool = True,
) -> dict[str, Any]:
    """Write programs of a model, their weights, and a record of both.

    Args:
      directory, step, ema: as for `checkpoint.load_model`.
      out: directory, created if missing. Other programs there stay, and in the record.
      programs, platforms, batch_size: as for `make_programs`.

    Returns:
      The record, as programs.json has it.

    Raises:
      ValueError, FileNotFoundError: as `checkpoint.load_model` and `make_programs`, flatbuffers is not installed, or
        other programs there are of other weights.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("export: needs the package flatbuffers; run pip install 'rq_jax[export]'")
    loaded, out = checkpoint.load_model(directory, step, ema), local_path(out)
    made, parts = make_programs(loaded, programs, platforms, batch_size), _parts(loaded)
    weights = {f"{part}.npz": checkpoint.fingerprint(one.variables) for part, one in parts.items()}
    described = _others(out, made, weights) | {name: _described(name, program) for name, program in made.items()}
    for name, program in made.items():
        write_atomic(out / f"{name}.jax", bytes(program.serialize()))
    for part in dict.fromkeys(PROGRAMS[name].part for name in made):
        with atomic_path(out / f"{part}.npz") as partial, open(partial, "wb") as file:
            np.savez(file, **flat_weights(parts[part].variables))
    used = {one["weights"]: weights[one["weights"]] for one in described.values()}
    record = {**checkpoint.origin_of(directory), "weights": used, "programs": described}
    if "sample" in made:
        record["sample"] = _sample_settings(loaded)
    elif "sample" in described:  # the program holds the settings of its time
        record["sample"] = read_json(out / RECORD)["sample"]
    write_json(out / RECORD, record)
    return record


def _others(out: Path, made: Collection[str], weights: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the record of a directory says of programs that are not made again.

    Raises:
      ValueError: they are of other weights, or the file holds no such record.
    """
    if not (out / RECORD).is_file():
        return {}
    record = read_json(out / RECORD)
    try:
        others = {name: one for name, one in record["programs"].items() if name not in made}
        before = {name: record["weights"][one["weights"]] for name, one in others.items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"--out: '{out / RECORD}' is no record of programs; give another") from None
    if unlike := [name for name, one in others.items() if before[name] != weights.get(one["weights"])]:
        raise ValueError(f"--out: '{out}' holds {', '.join(unlike)} of other weights; give another, or make all anew")
    return others


def make_programs(
    loaded: LoadedModel,
    names: Sequence[str] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    batch_size: int = BATCH_SIZE,
) -> dict[str, export.Exported]:
    """Programs of a model, by name; nothing is compiled, and no device of a platform is needed.

    Beside `flat_weights` of their model they take and give:

      encode: images (b, H, W, C), uint8, any number b of them -> codes (b, h, w, D), int32.
      decode: codes (b, h, w, D) -> images (b, H, W, C).
      sample: a seed, uint32, image ids (n,), uint32, and where the model has a condition it, (n, U), int32 -> codes
        (n, h, w, D). n is fixed, and settings are those of the config section `sample`. An image depends on seed and
        id alone, and is the one that sample.py draws with float32 weights.

    With grains, codes that come out are a dict of "codes" and "grains".

    Args:
      loaded: a tokenizer, or a transformer with its tokenizer.
      names: of `PROGRAMS`; None: all that the model has.
      platforms: "cpu", "cuda", "rocm" and "tpu", or some of them; each program runs on all.
      batch_size: n of sample.

    Raises:
      ValueError: an unknown name or platform, or a program that the model does not have.
    """
    parts, makers = _parts(loaded), {"encode": _encode, "decode": _decode, "sample": _sample}
    had = [name for name, kind in PROGRAMS.items() if kind.part in parts]
    for setting, values, allowed in (("programs", names or (), had), ("platforms", platforms, (*PLATFORMS, "rocm"))):
        for value in values:
            checks.one_of(setting, value, allowed)
    checks.integers("batch_size", batch_size, 1)
    made = {}
    for name in had if names is None else names:
        part = parts[PROGRAMS[name].part]
        function, inputs = makers[name](part, batch_size)
        weights = jax.eval_shape(flat_weights, part.variables)
        made[name] = export.export(jax.jit(function), platforms=tuple(platforms))(weights, *inputs)
    return made


def flat_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model as its programs take them: arrays by path, joined by "."."""
    return dict(named_leaves(variables, "."))


# --- the programs, each with the shapes of its inputs -----------------------------------------------------------------


def _encode(tokenizer: LoadedModel, batch_size: int) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    model = tokenizer.model

    def encode(weights, images):
        codes = model.apply(_variables(tokenizer, weights), sharding.scale(images), method="encode_to_codes")
        return _plain(codes)

    return encode, [_any_number(*model.image_shape, model.in_channels, dtype=jnp.uint8)]


def _decode(tokenizer: LoadedModel, batch_size: int) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    def decode(weights, codes):
        return images.decode(tokenizer.model, _variables(tokenizer, weights), codes)

    return decode, [_any_number(*tokenizer.model.code_shape, dtype=jnp.int32)]


def _sample(transformer: LoadedModel, batch_size: int) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    model, settings = transformer.model, _sample_settings(transformer)

    def sample(weights, seed, image_ids, *cond):
        variables, rng = _variables(transformer, weights), jax.random.key(seed)
        return _plain(sampling.generate(model, variables, rng, batch_size, *cond, image_ids=image_ids, **settings))

    inputs = [((), jnp.uint32), ((batch_size,), jnp.uint32)]
    if model.is_conditional:
        inputs.append(((batch_size, model.cond_length), jnp.int32))
    return sample, [jax.ShapeDtypeStruct(*one) for one in inputs]


def _sample_settings(transformer: LoadedModel) -> dict[str, Any]:
    return images.draw_settings(transformer.model, transformer.config.get("sample") or {}, {})


def _any_number(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """Of a batch whose size the caller of a program chooses."""
    return jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *shape), dtype)


def _variables(loaded: LoadedModel, weights: Mapping[str, Any]) -> Any:
    """The inverse of `flat_weights`."""
    leaves = [weights[name] for name in flat_weights(loaded.variables)]
    return jax.tree.unflatten(jax.tree.structure(loaded.variables), leaves)


def _plain(codes: Any) -> Any:
    """Codes as they leave a program: jax knows no types of this package where it runs alone."""
    return codes._asdict() if isinstance(codes, GrainedCodes) else codes


def _parts(loaded: LoadedModel) -> dict[str, LoadedModel]:
    """The models that there are programs of."""
    if loaded.tokenizer is not None:
        return {"tokenizer": loaded.tokenizer, "transformer": loaded}
    if (name := models.settings_of(loaded.model)["name"]) not in models.TOKENIZERS:
        raise ValueError(f"export: this '{name}' carries no tokenizer; give the directory of a stage-2 run")
    return {"tokenizer": loaded}


def _described(name: str, program: export.Exported) -> dict[str, Any]:
    def shown(aval: Any) -> str:
        return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"

    (_, *inputs), _ = jax.tree.unflatten(program.in_tree, map(shown, program.in_avals))
    output = jax.tree.unflatten(program.out_tree, map(shown, program.out_avals))
    kind = PROGRAMS[name]
    taken = dict(zip(kind.inputs, inputs, strict=False))  # without a condition there is none
    made_with = {"jax": jax.__version__, "platforms": list(program.platforms)}
    return {"weights": f"{kind.part}.npz", "inputs": taken, "output": output, **made_with}


# --- the command ------------------------------------------------------------------------------------------------------


def _names(text: str) -> list[str]:
    return text.split(",")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and a program is the same wherever it is made
    parser = cli.OneLineParser(prog="python -m rq_jax.export", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", type=cli.model_path, required=True, help="run or model directory, or hf://owner/name")
    add("--out", type=cli.path, required=True, help="directory of programs and weights")
    add("--programs", type=_names, help=f"of {','.join(PROGRAMS)} (default: all that the model has)")
    add("--platforms", type=_names, default=list(PLATFORMS), help=f"that each runs on (default: {','.join(PLATFORMS)})")
    add("--batch_size", type=int, default=BATCH_SIZE, help=f"images that sample draws (default: {BATCH_SIZE})")
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    with cli.one_line_errors():
        args = parser.parse_args(arguments)
        settings = args.programs, args.platforms, args.batch_size
        record = export_programs(args.checkpoint, args.out, *settings, step=args.step, ema=not args.no_ema)
        for name, program in record["programs"].items():
            print(f"{name}: {', '.join(program['inputs'].values())} -> {program['output']}, {args.out}/{name}.jax")


if __name__ == "__main__":
    main()
