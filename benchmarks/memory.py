"""What each device holds, from programs compiled on shapes for fake devices: no weight is ever made.

python -m benchmarks.memory --preset=imagenet256_3800m --mesh=1x8x1 [--mesh=8x1x1] [--batch=16] [--out=memory.json]
python -m benchmarks.memory --sample --preset=imagenet256_3800m --batch=100

Temporaries are those of XLA's CPU compiler, which plans memory with less care than those of accelerators: they bound.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import train_transformer
import train_vae
from benchmarks import timing
from benchmarks import train as training
from configs import rqtransformer, rqvae
from rq_jax import models, sampling
from rq_jax.devices import sharding
from rq_jax.devices.memory import device_bytes
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_atomic
from rq_jax.pretrained import vgg_lpips
from rq_jax.settings.construct import construct
from rq_jax.training import cli
from rq_jax.training.settings import resolve_durations

ROOT = Path(__file__).parents[1]
GIB = 2**30
COLUMNS = ("parameters", "optimizer", "average", "other state", "frozen", "temporaries", "total")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), default=2)
    add("--preset", action="append", required=True, help="of the stage's config file; may be repeated")
    add("--mesh", action="append", help="data x fsdp x tensor, such as 1x8x1; may be repeated (default: 1x1x1)")
    add("--batch", type=int, help="pictures over all devices (default: the preset's)")
    add("--accumulation_steps", type=int, help="micro-batches of stage 2 (default: the preset's)")
    add("--sample", action="store_true", help="the sampler on one device, its weights in bfloat16")
    add("--out", help="JSON file of the record")
    args = parser.parse_args(argv)
    args.mesh = [tuple(map(int, text.split("x"))) for text in args.mesh or ["1x1x1"]]
    return args


def on_shapes(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """The shapes of a tree, whole on every device."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))  # noqa: E731
    return jax.tree.map(place, tree)


def stage1_program(full: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any, Any]:
    """(step, shapes of its state, of what it reads, the model)."""
    run = training.prepare(full, mesh)
    durations = resolve_durations(full.loss, "loss", train_vae.LOSS_DURATIONS, training.STEPS_PER_EPOCH)
    loss = construct(train_vae.Losses, "loss", durations)
    adversary = perceptual = frozen = None
    if loss.adversarial_weight:
        adversary = train_vae.make_adversary(full, run["model"], run["optim"], run["settings"].total_steps)
    if loss.perceptual_weight:
        frozen = on_shapes(mesh, vgg_lpips.abstract_variables())
        perceptual = vgg_lpips.Perceptual("shapes", frozen)
    phase = train_vae.Phase(perceptual is not None, adversary is not None)
    train_step = train_vae.make_train_step(
        run["model"], run["optimizer"], loss, run["settings"].ema_decay, perceptual, adversary, mesh
    )
    _, shapes = train_vae.state_program(full, {**run, "adversary": adversary})
    return (lambda state, batch, frozen: train_step(state, batch, phase, frozen)), shapes, frozen, run["model"]


def stage2_program(full: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any, Any]:
    """(step, shapes of its state, of the frozen tokenizer, the tokenizer)."""
    tokenizer = training.fill_from_preset(full)
    run = training.prepare(full, mesh)
    loss = construct(train_transformer.Losses, "loss", full.loss)
    loss.check(run["model"])
    frozen = on_shapes(mesh, models.abstract_variables(tokenizer))
    step = train_transformer.make_train_step(run["model"], tokenizer, run["optimizer"], loss, run["settings"].ema_decay)
    _, shapes = train_transformer.state_program(full, run, frozen["codebook"]["codebook_KE"])
    return step, shapes, frozen, tokenizer


def train_entry(args: argparse.Namespace, preset: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What a training step of a preset holds on each device of a mesh."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    full = (rqvae if args.stage == 1 else rqtransformer).get_config(preset)
    full.data.batch_size = args.batch or full.data.batch_size
    full.optim.accumulation_steps = args.accumulation_steps or full.optim.accumulation_steps
    sharding.check_batch_size(mesh, full.data.batch_size, full.optim.accumulation_steps)
    step, state, frozen, tokenizer = (stage1_program if args.stage == 1 else stage2_program)(full, mesh)

    def rows(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        shape = (full.data.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    batch = {"image": rows(*tokenizer.image_shape, tokenizer.in_channels)}
    if args.stage == 2 and full.model.cond_vocab_size > 1:
        batch["cond"] = rows(full.model.cond_length, dtype=jnp.int32)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled, seconds = compile_on_shapes(step, state, batch, frozen, out_shardings=(shardings, None), donate_argnums=0)
    held = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "average": device_bytes(state.ema_params),
        "other state": device_bytes((state.model_state, state.discriminator, state.discriminator_opt_state)),
        "frozen": device_bytes(frozen),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    config = {"stage": args.stage, "preset": preset, "mesh": "x".join(map(str, sizes)), "batch": full.data.batch_size}
    config |= {"accumulation_steps": full.optim.accumulation_steps, "use_remat": full.model.use_remat}
    return entry(config, held, seconds)


def sample_entry(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """What the sampler of a preset holds on one device."""
    full = rqtransformer.get_config(preset)
    training.fill_from_preset(full)
    full.model.dtype = "bfloat16"
    model, batch = models.create(**full.model), args.batch or 100
    cond = jax.ShapeDtypeStruct((batch, model.cond_length), jnp.int32) if model.is_conditional else None
    variables = jax.eval_shape(lambda v: model.for_inference(v, "bfloat16"), models.abstract_variables(model))

    def generate(variables: Any, rng: jax.Array, cond: Any) -> jax.Array:
        return sampling.generate(model, variables, rng, batch, cond, **full.sample)

    compiled, seconds = compile_on_shapes(generate, variables, jax.eval_shape(lambda: jax.random.key(0)), cond)
    held = {"parameters": device_bytes(variables), "temporaries": compiled.memory_analysis().temp_size_in_bytes}
    return entry({"stage": 2, "preset": preset, "sample": True, "batch": batch}, held, seconds)


def compile_on_shapes(function: Any, *args: Any, **options: Any) -> tuple[Any, float]:
    """(the compiled program, seconds)."""
    start = time.perf_counter()
    return jax.jit(function, **options).lower(*args).compile(), time.perf_counter() - start


def entry(config: dict[str, Any], held: dict[str, int], seconds: float) -> dict[str, Any]:
    """A row of the record."""
    gib = {name: round(size / GIB, 3) for name, size in held.items()}
    gib["total"] = round(sum(held.values()) / GIB, 3)
    return {"config": config, "gib_per_device": gib, "compile_seconds": round(seconds, 1)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Compile, print a table and the record as JSON."""
    args = parse_args(argv)
    count = max(data * fsdp * tensor for data, fsdp, tensor in args.mesh)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    jax.config.update("jax_platforms", "cpu")
    with cli.one_line_errors():
        if args.sample:
            results = [sample_entry(args, preset) for preset in args.preset]
        else:
            results = [train_entry(args, preset, sizes) for preset in args.preset for sizes in args.mesh]
    record = {"benchmark": "memory", "environment": environment(ROOT), "results": results}
    rows = [{name: f"{one['gib_per_device'].get(name, 0.0):.2f}" for name in COLUMNS} for one in results]
    print("GiB on each device:")
    print(timing.table([one["config"] for one in results], rows))
    if args.out:
        write_atomic(args.out, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
