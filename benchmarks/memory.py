"""Memory of each device, from programs compiled on shapes for fake devices; no weights are drawn.

python -m benchmarks.memory --preset=imagenet256_3800m --mesh=1x8x1 [--mesh=8x1x1] [--batch=16] [--out=memory.json]
python -m benchmarks.memory --sample --preset=imagenet256_3800m --batch=100

Temporaries are upper bounds: XLA's CPU compiler plans memory less tightly than its compilers for accelerators.
"""

import argparse
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing, train
from rq_jax import models, sampling
from rq_jax.devices import sharding
from rq_jax.devices.memory import device_bytes
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_json
from rq_jax.training import cli

ROOT = Path(__file__).parents[1]
GIB = 2**30
COLUMNS = ("parameters", "optimizer", "average", "other state", "frozen", "temporaries", "total")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.OneLineParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), default=2)
    add("--preset", action="append", required=True, help="of the stage's config file; may be repeated")
    add(
        "--mesh",
        type=mesh_sizes,
        action="append",
        help="data x fsdp x tensor, such as 1x8x1; may be repeated (default: 1x1x1)",
    )
    add("--batch", type=int, help="images over all devices (default: the preset's)")
    add("--accumulation_steps", type=int, help="micro-batches of stage 2 (default: the preset's)")
    add("--sample", action="store_true", help="the sampler on one device, its weights in bfloat16")
    add("--out", type=cli.path, help="JSON file of the record")
    args = parser.parse_args(argv)
    args.mesh = args.mesh or [(1, 1, 1)]
    return args


def mesh_sizes(text: str) -> tuple[int, ...]:
    """Sizes of the axes of a mesh, such as "1x8x1"."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no mesh; give data x fsdp x tensor, such as 1x8x1")
    return tuple(map(int, text.split("x")))


def train_entry(args: argparse.Namespace, preset: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Memory of a training step of a preset on each device of a mesh."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    config = {"stage": args.stage, "preset": preset, "mesh": "x".join(map(str, sizes)), "batch": args.batch}
    config |= {"accumulation_steps": args.accumulation_steps}
    settings = train.load_settings(config)
    batch_size, accumulation_steps = settings["data"]["batch_size"], settings["optim"]["accumulation_steps"]
    sharding.check_batch_size(mesh, batch_size, accumulation_steps)

    def whole(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding.replicated(mesh))

    recipe = train.make_recipe(settings, mesh, functools.partial(jax.tree.map, whole))
    state = recipe.abstract_state()
    compiled = train.compile_step(recipe, state, train.batch_shapes(recipe, batch_size))
    held = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "average": device_bytes(state.ema_params),
        "other state": device_bytes((state.model_state, state.discriminator, state.discriminator_opt_state)),
        "frozen": device_bytes(recipe.frozen),
        "temporaries": compiled.memory["temporaries"],
    }
    config |= {"batch": batch_size, "accumulation_steps": accumulation_steps}
    config |= {"use_remat": settings["model"]["use_remat"]}
    return entry(config, held, compiled.seconds)


def sample_entry(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Memory of the sampler of a preset on one device."""
    settings = train.load_settings({"stage": 2, "preset": preset, "dtype": "bfloat16"})
    model, batch = models.create(**settings["model"]), args.batch or 100
    cond = jax.ShapeDtypeStruct((batch, model.cond_length), jnp.int32) if model.is_conditional else None
    variables = jax.eval_shape(lambda v: model.for_inference(v, "bfloat16"), models.abstract_variables(model))

    def generate(variables: Any, rng: jax.Array, cond: Any) -> jax.Array:
        return sampling.generate(model, variables, rng, batch, cond, **settings["sample"])

    rng = jax.eval_shape(lambda: jax.random.key(0))
    compiled = timing.compile_program(generate, variables, rng, cond)
    held = {"parameters": device_bytes(variables), "temporaries": compiled.memory["temporaries"]}
    return entry({"stage": 2, "preset": preset, "sample": True, "batch": batch}, held, compiled.seconds)


def entry(config: dict[str, Any], held: dict[str, int], seconds: float) -> dict[str, Any]:
    """A row of the record."""
    gib = {name: round(size / GIB, 3) for name, size in held.items()}
    gib["total"] = round(sum(held.values()) / GIB, 3)
    return {"config": config, "gib_per_device": gib, "compile_seconds": round(seconds, 1)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compile, print a table and the record as JSON."""
    with cli.one_line_errors():
        args = parse_args(argv)
        count = max(math.prod(sizes) for sizes in args.mesh)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        jax.config.update("jax_platforms", "cpu")
        if args.sample:
            results = [sample_entry(args, preset) for preset in args.preset]
        else:
            results = [train_entry(args, preset, sizes) for preset in args.preset for sizes in args.mesh]
    record = {"benchmark": "memory", "environment": environment(ROOT), "results": results}
    rows = [{name: f"{one['gib_per_device'].get(name, 0.0):.2f}" for name in COLUMNS} for one in results]
    print("GiB on each device:")
    print(timing.table([one["config"] for one in results], rows))
    if args.out:
        write_json(args.out, record)
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
