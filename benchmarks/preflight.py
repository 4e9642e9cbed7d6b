"""What a program of a preset needs on devices that are not here, as their own compiler plans it.

Memory, operations, collectives, loops and kernels of a training step, the sampler or the decoder; no weights are drawn
and nothing runs. The times are predictions: of the roofline, of collectives at the speed of the links, of launches.
"""

import argparse
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import hlo, roofline, targets, timing, train
from rq_jax import models, sampling
from rq_jax.devices import sharding
from rq_jax.devices.memory import device_bytes
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_json
from rq_jax.models.flops import Work, count_traced, decoder_work
from rq_jax.report.progress import Progress

ROOT = Path(__file__).parents[1]
GIB = 2**30
STAGES = ("1", "2", "sample", "decode")
LAUNCH_SECONDS = 3e-6  # of a kernel on a GPU, where none is waited for

COLUMNS = ("parameters", "optimizer", "average", "other state", "frozen", "batch", "temporaries", "peak", "device")

Config = dict[str, Any]


class Plan(NamedTuple):
    """A program before it is compiled.

    Attributes:
      compile: compiles it.
      held: bytes on each device by name, of its arguments.
      work: of all devices together, part by part; see `roofline.roofline`.
      flops: operations of the program as it is traced, recomputation included, of all devices together.
      parameters: shapes of parameters, whole and as they are split.
      global_batch: images of one forward pass over all devices.
      images: of one run of the program.
    """

    compile: Callable[[], timing.Compiled]
    held: Mapping[str, int]
    work: Mapping[str, Work]
    flops: float
    parameters: frozenset[tuple[int, ...]]
    global_batch: int
    images: int


def mesh_sizes(text: str) -> tuple[int, ...]:
    """Sizes of the axes of a mesh, such as "1x8x1"."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no mesh; give data x fsdp x tensor, such as 1x8x1")
    return tuple(map(int, text.split("x")))


def configs(args: argparse.Namespace, target: targets.Target) -> list[Config]:
    """What to compile, of a command line.

    Raises:
      ValueError: settings that do not fit together.
    """
    _check(args, target)
    training = args.stage in ("1", "2")
    count = len(target.devices)
    meshes = args.mesh or [(count, 1, 1)]
    if args.fits and not args.mesh:
        meshes = sorted({(count, 1, 1), (1, count, 1), *([(1, count // 2, 2)] if count % 2 == 0 else [])})
    made = []
    for preset, sizes, batch in itertools.product(args.preset, meshes if training else [None], args.batch or [None]):
        config = {"target": target.name, "stage": args.stage, "preset": preset, "quicktest": args.quicktest}
        config |= {"mesh": sizes, "batch": batch, "accumulation_steps": args.accumulation_steps}
        config |= {"gradients": args.gradients, "remat": args.remat}
        made.append({**config, "weights": args.weights or "bfloat16"} if args.stage == "sample" else config)
    if not args.fits:
        return made
    divided = [config for config in made if _batch_size(config) % math.prod(config["mesh"][:2]) == 0]
    if len(divided) < len(made) and (args.mesh or not divided):
        config = next(config for config in made if config not in divided)
        sharding.check_batch_size(target.make_mesh(config["mesh"]), _batch_size(config))
    return divided


def _check(args: argparse.Namespace, target: targets.Target) -> None:
    """Refuse options that do not fit together."""
    training = args.stage in ("1", "2")
    if args.fits and not training:
        raise ValueError(f"--fits: is for training, not for --stage={args.stage}; leave it out")
    for name in ("mesh", "accumulation_steps", "gradients", "remat"):
        if getattr(args, name) and not training:
            raise ValueError(f"--{name}: is for training, not for --stage={args.stage}, which takes one device")
    for name in ("accumulation_steps", "gradients"):
        value = getattr(args, name)
        if value and args.stage == "1":
            raise ValueError(f"--{name}: {value} is for stage 2; leave it out")
        if value and args.fits:
            raise ValueError(f"--{name}: {value} is what --fits looks for; leave one out")
    if args.weights and args.stage != "sample":
        raise ValueError(f"--weights: {args.weights} is for --stage=sample, not for --stage={args.stage}; leave it out")
    if args.fits and target.chip is None:
        raise ValueError(f"--fits: {target.name} has no memory to fit; give an accelerator as --target")
    if args.out and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        raise ValueError(
            f"--out: '{args.out}' is no file that can be written; give a file in a directory that is there"
        )


def _batch_size(config: Config) -> int:
    return int(train.load_settings({**config, "stage": int(config["stage"])})["data"]["batch_size"])


def plan(config: Config, target: targets.Target) -> Plan:
    """The program of a configuration, which gains what the preset says where it was silent.

    Raises:
      ValueError: settings that are not allowed.
    """
    return {"sample": _plan_sampling, "decode": _plan_decoding}.get(config["stage"], _plan_step)(config, target)


def _plan_step(config: Config, target: targets.Target) -> Plan:
    mesh = target.make_mesh(config["mesh"])
    settings = train.load_settings({**config, "stage": int(config["stage"])})
    if config["remat"]:
        settings["model"]["use_remat"] = config["remat"] == "on"
    batch_size, steps = settings["data"]["batch_size"], settings["optim"]["accumulation_steps"]
    sharding.check_batch_size(mesh, batch_size, steps)
    config |= {"batch": batch_size, "accumulation_steps": steps}
    config["remat"] = "on" if settings["model"]["use_remat"] else "off"
    if steps > 1:
        config["gradients"] = "sharded" if settings["optim"]["use_sharded_gradients"] else "whole"

    def whole(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding.replicated(mesh))

    recipe = train.make_recipe(settings, mesh, functools.partial(jax.tree.map, whole))
    state, batch = recipe.abstract_state(), train.batch_shapes(recipe, batch_size)
    other = state.model_state, state.discriminator, state.discriminator_opt_state
    trees = {"parameters": state.params, "optimizer": state.opt_state, "average": state.ema_params}
    trees |= {"other state": other, "frozen": recipe.frozen, "batch": batch}
    work = train.step_work(recipe, state, batch, 1)
    return Plan(
        functools.partial(train.compile_step, recipe, state, batch),
        {name: device_bytes(tree) for name, tree in trees.items()},
        work,
        sum(part.flops for part in work.values()),
        _shapes((state.params, state.model_state, state.discriminator, recipe.frozen)),
        batch_size // steps,
        batch_size,
    )


def _plan_sampling(config: Config, target: targets.Target) -> Plan:
    settings = train.load_settings({**config, "stage": 2, "dtype": "bfloat16", "batch": None})
    model, batch = models.create(**settings["model"]), config["batch"] or 100
    config |= {"batch": batch}
    prepare = functools.partial(model.for_inference, dtype=config["weights"], platform=target.platform)
    stored = jax.eval_shape(prepare, models.abstract_variables(model))
    place = _on(target)
    variables, rng = place(stored), place(jax.eval_shape(lambda: jax.random.key(0)))
    cond = place(jax.ShapeDtypeStruct((batch, model.cond_length), jnp.int32)) if model.is_conditional else None

    def generate(variables: Any, rng: jax.Array, cond: Any) -> jax.Array:
        return sampling.generate(model, variables, rng, batch, cond, **settings["sample"])

    work = roofline.sampling_work(model, batch, config["weights"], bool(settings["sample"].get("guidance")))
    compile = functools.partial(timing.compile_program, generate, variables, rng, cond)
    flops = count_traced(generate, variables, rng, cond).flops
    return Plan(compile, {"parameters": device_bytes(variables)}, work, flops, _shapes(variables), batch, batch)


def _plan_decoding(config: Config, target: targets.Target) -> Plan:
    settings = train.load_settings({**config, "stage": 1, "dtype": "bfloat16", "batch": None})
    model, batch = models.create(**settings["model"]), config["batch"] or 100
    config |= {"batch": batch}
    place = _on(target)
    variables = place(models.abstract_variables(model))
    codes = place(jax.ShapeDtypeStruct((batch, *model.code_shape), jnp.int32))
    decode = functools.partial(model.apply, method="decode_codes")
    work = decoder_work(model, batch)
    compile = functools.partial(timing.compile_program, decode, variables, codes)
    held = {"parameters": device_bytes(variables)}
    return Plan(compile, held, {"decoder": work}, work.flops, _shapes(variables), batch, batch)


def _on(target: targets.Target) -> Callable[[Any], Any]:
    """Places a tree of shapes on the first device."""
    where = jax.sharding.SingleDeviceSharding(target.devices[0])
    return functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where))


def _shapes(tree: Any) -> frozenset[tuple[int, ...]]:
    """Shapes of a tree's arrays, whole and as they are split, in any order of their axes."""
    shapes = set()
    for leaf in jax.tree.leaves(tree):
        split = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        shapes |= {hlo.axes(shape) for shape in (leaf.shape, split)}
        shapes |= {hlo.axes(shape[1:]) for shape in (leaf.shape, split)}  # a layer of a stack
    return frozenset(shapes)


def measure(config: Config, target: targets.Target) -> dict[str, Any]:
    """Compile a configuration: a result of the record.

    Raises:
      ValueError: settings that are not allowed.
    """
    planned = plan(config, target)
    compiled = planned.compile()
    text, devices = compiled.call.as_text(), math.prod(config.get("mesh") or (1,))
    counts, (launched, in_loops) = hlo.count_compiled(text), hlo.kernels(text)
    memory = _memory(planned, compiled, target)
    rows = _collectives(hlo.collectives(text), planned, target)
    executed = counts.flops
    seconds = {"collectives": sum(row["seconds"] for row in rows)}
    seconds["launches"] = launched * LAUNCH_SECONDS if target.platform == "gpu" else 0.0
    if target.peaks is not None:
        seconds["roofline"] = roofline.roofline(planned.work, target.peaks.times(devices)).seconds
        seconds["predicted"] = sum(seconds.values())
    return {
        "config": config,
        "compile_seconds": round(compiled.seconds, 1),
        "gib_per_device": memory,
        "flops_per_device": {"executed": executed, "arithmetic": planned.flops / devices},
        "collectives": rows,
        "loops_of_unknown_length": counts.unknown_loops,
        "conditionals_in_loops": counts.loop_ops["conditional"],
        "kernels": launched,
        "kernels_in_loops": in_loops,
        "seconds": seconds,
        "images_per_second": planned.images / seconds["predicted"] if "predicted" in seconds else None,
    }


def _memory(planned: Plan, compiled: timing.Compiled, target: targets.Target) -> dict[str, Any]:
    plan = compiled.memory
    peak = plan["arguments"] + plan["outputs"] - plan["aliased"] + plan["temporaries"]
    held = {**planned.held, "temporaries": plan["temporaries"], "peak": peak}
    memory: dict[str, Any] = {name: round(size / GIB, 3) for name, size in held.items()}
    if target.chip is not None:
        memory |= {"device": round(target.chip.memory / GIB, 1), "fits": peak <= target.chip.memory}
    return memory


def _collectives(found: Sequence[hlo.Collective], planned: Plan, target: targets.Target) -> list[dict[str, Any]]:
    """A row for each kind and group: runs, bytes, and how many of them are of the whole batch."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for each in found:
        row = rows.setdefault(
            (each.opcode, each.group_size),
            {"kind": each.opcode, "group": each.group_size, "runs": 0, "mib": 0.0, "mib_of_batch": 0.0, "seconds": 0.0},
        )
        row["runs"] += each.times
        row["mib"] += each.times * each.bytes / 2**20
        row["mib_of_batch"] += each.times * hlo.bytes_of_batch(each, planned.global_batch, planned.parameters) / 2**20
        row["seconds"] += each.times * each.bytes_sent / target.link(each.group)
    return sorted(rows.values(), key=lambda row: -row["mib"])


# --- the fastest that fits ---


def fastest(config: Config, target: targets.Target, tell: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """Results for one mesh, without and with recomputation: each with the fewest micro-batches that fit the device.

    Several micro-batches add up gradients, which one has no need of: one is tried first. Beyond it more of them need
    less memory and more time, so that their number is found by bisection: with whole gradients, which move least, and
    where none fits with gradients that are split along fsdp.
    """
    images = _batch_size(config) // math.prod(config["mesh"][:2])
    divisors = [steps for steps in range(2, images + 1) if images % steps == 0]
    if config["stage"] == "1":
        divisors = []  # it has no micro-batches
    for remat in [config["remat"]] if config["remat"] else ["off", "on"]:

        def attempt(steps: int, gradients: str | None, remat: str = remat) -> dict[str, Any] | None:
            options = {"accumulation_steps": steps, "gradients": gradients, "remat": remat}
            result = measure({**config, **options}, target)
            tell(result)
            return result if result["gib_per_device"]["fits"] else None

        best = attempt(1, None)
        for gradients in ("whole", "sharded") if config["mesh"][1] > 1 else ("whole",):
            low, high = 0, len(divisors) - 1 if best is None else -1
            while low <= high:
                middle = (low + high) // 2
                if result := attempt(divisors[middle], gradients):
                    best, high = result, middle - 1
                else:
                    low = middle + 1
        if best is not None:
            yield best


# --- the command ---


def figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Cells of a result in a table, by heading."""
    memory, seconds, flops = result["gib_per_device"], result["seconds"], result["flops_per_device"]
    cells = {f"{name} GiB": f"{memory[name]:.2f}" for name in COLUMNS if memory.get(name)}
    if "fits" in memory:
        cells["fits"] = "yes" if memory["fits"] else "NO"
    cells["TFLOP"] = f"{flops['executed'] / 1e12:.3g}"
    cells["of arithmetic"] = f"{flops['executed'] / flops['arithmetic']:.2f}"
    cells["moved MiB"] = f"{sum(row['mib'] for row in result['collectives']):.0f}"
    cells["of batch"] = f"{sum(row['mib_of_batch'] for row in result['collectives']):.0f}"
    cells["open loops"], cells["branches"] = map(
        str, (result["loops_of_unknown_length"], result["conditionals_in_loops"])
    )
    cells["kernels"] = str(result["kernels"])
    if "predicted" in seconds:
        cells["predicted s"], cells["images/s"] = f"{seconds['predicted']:.3g}", f"{result['images_per_second']:.3g}"
    return cells | {"compile s": f"{result['compile_seconds']:.0f}"}


def show(results: Sequence[Mapping[str, Any]]) -> str:
    """The table of results, and one of the collectives of each."""
    lines = ["A device:", timing.table([each["config"] for each in results], [figures(each) for each in results])]
    for each in results:
        for row in each["collectives"]:
            config = " ".join(timing.show(each["config"][key]) for key in ("preset", "mesh") if each["config"][key])
            lines.append(
                f"{config}: {row['runs']} {row['kind']} over {row['group']} devices, {row['mib']:.1f} MiB, "
                f"{row['mib_of_batch']:.1f} of the whole batch"
            )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile what the command line asks for; print tables, and the record as JSON in the last line.

    Raises:
      ValueError: settings that are not allowed, or nothing that fits.
      ModuleNotFoundError: the compiler of the target is not installed.
    """
    target = targets.find(args.target)
    made = configs(args, target)
    results, tried = [], []
    with Progress(None if args.fits else len(made), unit="program", title="compiling") as progress:

        def tell(result: dict[str, Any]) -> None:
            tried.append(result)
            progress.update()

        for config in made:
            if args.fits:
                results += fastest(config, target, tell)
            else:
                results.append(measure(config, target))
                progress.update()
    record = {"benchmark": "compile", "environment": environment(ROOT), "target": _described(target)}
    if args.fits:
        print(show(tried))
        if not results:
            raise ValueError(f"--fits: nothing of {', '.join(args.preset)} fits {target.name}; give more devices")
        results.sort(key=lambda each: -each["images_per_second"])
        print("The fastest that fits:")
        record["tried"] = [each["config"] | {"gib_per_device": each["gib_per_device"]} for each in tried]
    print(show(results[:1] if args.fits else results))
    record["results"] = results
    print(json.dumps(record))
    if args.out:
        write_json(args.out, record)
    return record


def _described(target: targets.Target) -> dict[str, Any]:
    peaks = None if target.peaks is None else {**target.peaks._asdict(), "flops": dict(target.peaks.flops)}
    chip = None if target.chip is None else target.chip._asdict()
    return {"name": target.name, "devices": len(target.devices), "chip": chip, "peaks": peaks}
