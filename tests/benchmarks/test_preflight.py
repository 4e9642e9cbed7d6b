"""benchmark.py compile: what it says a device holds, moves and computes; the targets, and what is refused."""

import json

import helpers
import jax
import jax.numpy as jnp
import pytest

import benchmark
from benchmarks import hlo, preflight, targets, train
from configs import rqtransformer, rqvae
from rq_jax.devices import sharding
from rq_jax.devices.memory import device_bytes

SMALL = {
    "model.width": 8, "model.width_multipliers": (1, 1), "model.code_shape": (8, 8, 2), "discriminator.width": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Presets whose programs compile in seconds."""
    for module, changes in ((rqvae, SMALL), (rqtransformer, {"model.model_dim": 16, "model.spatial_layers": 1})):
        get = module.get_config

        def shrunk(preset, get=get, changes=changes):
            config = get(preset)
            config.update_from_flattened_dict(changes)
            return config

        monkeypatch.setattr(module, "get_config", shrunk)
    monkeypatch.setenv("XLA_FLAGS", "")  # where the number of fake devices is added
    with helpers.quick_compilation():
        yield


def compiled(capsys, *options):
    """Results of a command, and what it printed before them."""
    record = preflight.run(benchmark.parse_args(["compile", *options]))
    *shown, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(json.dumps(record))
    return record["results"], "\n".join(shown)


def fullest(tree):
    """Bytes of real arrays on the device that holds most."""
    held = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def drawn_state(config, mesh):
    """The state of a preset as a run draws it."""
    zeros = lambda shapes: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    recipe = train.make_recipe(train.load_settings(config), mesh, zeros)
    return recipe.init(jax.random.key(recipe.seed))


def test_a_transformer_on_two_meshes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "GIB", 1)
    out = tmp_path / "record.json"
    options = "--target=cpu:8", "--preset=demo", "--mesh=8x1x1,1x4x2", "--batch=16", f"--out={out}"
    (whole, split), shown = compiled(capsys, *options)
    assert json.loads(out.read_text())["results"][1]["config"] == {**split["config"], "mesh": [1, 4, 2]}
    for found, sizes in ((whole, {"data": 8}), (split, {"data": 1, "fsdp": 4, "tensor": 2})):
        state = drawn_state({"stage": 2, "preset": "demo"}, sharding.make_mesh(**sizes))
        held = found["gib_per_device"]
        assert held["parameters"] == fullest(state.params) == device_bytes(state.params)
        assert held["optimizer"] == fullest(state.opt_state) and held["average"] == fullest(state.ema_params)
        assert held["peak"] >= held["temporaries"] > 0 and "fits" not in held
        assert found["loops_of_unknown_length"] == 0 and found["kernels"] > found["kernels_in_loops"]
    assert split["gib_per_device"]["parameters"] < 0.4 * whole["gib_per_device"]["parameters"]
    # Along data only gradients travel, and they do so whole.
    rows = {row["kind"]: row for row in whole["collectives"]}
    assert rows["all-reduce"]["mib"] * 2**20 > whole["gib_per_device"]["parameters"]
    assert "demo 8x1x1: " in shown and "all-reduce over 8 devices" in shown


@pytest.mark.slow
@pytest.mark.parametrize("stage, batch", [("1", 8), ("sample", 2), ("decode", 2)])
def test_every_stage_compiles(capsys, monkeypatch, stage, batch):
    monkeypatch.setattr(preflight, "GIB", 1)
    (found,), _ = compiled(capsys, "--target=cpu:8", f"--stage={stage}", "--preset=demo", f"--batch={batch}")
    assert found["gib_per_device"]["peak"] > 0 and found["config"]["batch"] == batch
    flops = found["flops_per_device"]
    assert 0.9 < flops["executed"] / flops["arithmetic"] < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_accelerators(capsys, target):
    try:
        targets.find(target)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    options = f"--target={target}", "--preset=demo", "--batch=16", "--mesh=1x8x1"
    (found,), shown = compiled(capsys, *options)
    assert found["gib_per_device"]["fits"] and found["loops_of_unknown_length"] == 0
    assert found["seconds"]["predicted"] > found["seconds"]["roofline"] > 0 and "images/s" in shown
    (best, *_), shown = compiled(capsys, *options[:-1], "--fits")
    assert "The fastest that fits:" in shown and best["config"]["accumulation_steps"] == 1
    assert best["images_per_second"] >= found["images_per_second"]


def test_the_fewest_micro_batches_that_fit_are_found(monkeypatch):
    tried = []

    def measure(config, target):
        tried.append((config["remat"], config["accumulation_steps"]))
        steps = config["accumulation_steps"]
        needed = {"off": 40, "on": 10, "one": 6 if steps == 1 else 999}[config["remat"]] / steps
        return {"config": config, "gib_per_device": {"fits": needed <= 6}}

    monkeypatch.setattr(preflight, "measure", measure)
    config = {"stage": "2", "preset": "demo", "batch": 128, "mesh": (8, 1, 1), "remat": None}
    found = list(preflight.fastest(config, None, lambda result: None))
    # 16 images a device: 40 / 8 fit without recomputation, 10 / 2 with it.
    assert [(each["config"]["remat"], each["config"]["accumulation_steps"]) for each in found] == [
        ("off", 8),
        ("on", 2),
    ]
    assert len(tried) <= 8
    assert len(list(preflight.fastest({**config, "remat": "on"}, None, lambda result: None))) == 1
    # One has no gradients to add up, and may fit where several do not.
    (found,) = preflight.fastest({**config, "remat": "one"}, None, lambda result: None)
    assert found["config"]["accumulation_steps"] == 1


def test_gradients_are_split_where_whole_ones_do_not_fit(monkeypatch):
    def measure(config, target):
        needed = {"whole": 8, "sharded": 1, None: 99}[config["gradients"]] + 16 / config["accumulation_steps"]
        return {"config": config, "gib_per_device": {"fits": needed <= 6}}

    monkeypatch.setattr(preflight, "measure", measure)
    config = {"stage": "2", "preset": "demo", "batch": 128, "mesh": (1, 8, 1), "remat": "on"}
    (found,) = preflight.fastest(config, None, lambda result: None)
    assert (found["config"]["gradients"], found["config"]["accumulation_steps"]) == ("sharded", 4)
    assert list(preflight.fastest({**config, "mesh": (8, 1, 1)}, None, lambda result: None)) == []  # not along data


def test_meshes_that_do_not_divide_the_batch_are_left_out():
    target = targets.Target("h100:8", (None,) * 8, targets.CHIPS["h100"], None)
    args = benchmark.parse_args(["compile", "--target=h100:8", "--preset=demo", "--fits", "--batch=12"])
    assert [config["mesh"] for config in preflight.configs(args, target)] == [(1, 4, 2)]


def test_links_between_hosts_are_slower():
    target = targets.Target("a100:2x8", (), targets.CHIPS["a100"], None)
    device = lambda: None  # noqa: E731
    device.platform = "gpu"
    target = target._replace(devices=(device,) * 16)
    assert target.link((0, 7)) == target.link((8, 15)) == 300e9
    assert target.link((0, 8)) == target.link(tuple(range(16))) == 50e9


def test_what_of_a_collective_is_of_the_batch():
    parameters = frozenset({(24, 48), (3, 4, 16, 64)})
    shapes = {
        "tokens": (64, 24),
        "statistics": (16, 4),
        "weight": (48, 24),
        "its part": (8, 24),
        "sum": (48,),
        "joined": (192, 64),
    }
    moved = {
        name: hlo.bytes_of_batch(hlo.Collective("all-reduce", (("f32", shape),), 1, tuple(range(8))), 16, parameters)
        for name, shape in shapes.items()
    }
    assert moved == {"tokens": 4 * 64 * 24, "statistics": 4 * 64, "weight": 0, "its part": 0, "sum": 0, "joined": 0}


@pytest.mark.parametrize("kind", targets._GPUS)
def test_a_gpu_is_described_to_its_compiler(kind):
    text = targets.gpu_config(kind)
    assert text.count("{") == text.count("}") and f"device_memory_size: {int(targets.CHIPS[kind].memory)}" in text
    assert f'device_description_str: "{targets.CHIPS[kind].kind}"' in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mesh=3x1x1"], "--mesh: 3x1x1 does not fit the 8 devices of --target=cpu:8"),
        (["--mesh=2x1"], "--mesh: '2x1' is no mesh; give data x fsdp x tensor, such as 1x8x1"),
        (["--batch=12"], "data.batch_size: 12 is not a multiple of 8"),
        (["--target=h100"], "--target: 'h100' is unknown; allowed are cpu:..., a100:..., "),
        (["--target=b300:8"], "--target: 'b300:8' is unknown; allowed are cpu:..., a100:..., "),
        (["--stage=3"], "'3' is unknown; allowed are 1, 2, sample, decode"),
        (["--stage=sample", "--mesh=8x1x1"], "--mesh: is for training, not for --stage=sample, which takes one device"),
        (["--stage=decode", "--fits"], "--fits: is for training, not for --stage=decode; leave it out"),
        (["--fits"], "--fits: cpu:8 has no memory to fit; give an accelerator as --target"),
        (["--preset=big"], "preset 'big' is unknown; allowed are"),
        (["--stage=1", "--accumulation_steps=4"], "--accumulation_steps: 4 is for stage 2; leave it out"),
        (["--gradients=sharded", "--stage=1"], "--gradients: sharded is for stage 2; leave it out"),
        (["--fits", "--accumulation_steps=2"], "--accumulation_steps: 2 is what --fits looks for; leave one out"),
        (["--stage=decode", "--weights=int8"], "--weights: int8 is for --stage=sample, not for --stage=decode"),
        (["--out=/"], "--out: '/' is no file that can be written; give a file in a directory that is there"),
        (["--target=h100:1x1x8"], "'h100:1x1x8' is no cluster of GPUs; give their number or hosts x GPUs, as 2x8"),
        (["--target=v5e:512x512"], "'v5e:512x512' is no slice; its sides are at most 16"),
        (["--target=cpu:1000"], "'cpu:1000' has too many fake devices; give at most 512"),
    ],
)
def test_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "compile", "--target=cpu:8", "--preset=demo", *options])
    with pytest.raises(SystemExit) as error:
        benchmark.main()
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and "Traceback" not in printed


def test_a_missing_compiler_is_told(monkeypatch, capsys):
    monkeypatch.setattr(targets, "_is_installed", lambda package: False)
    for target, package in (("h100:8", "jax_plugins.xla_cuda12"), ("v5e:2x2", "libtpu")):
        with pytest.raises(ModuleNotFoundError, match=f"--target: {target} needs the package {package}; `make aot`"):
            targets.find(target)
