"""benchmarks.memory: what it says a device holds is what the arrays of a run take there."""

import json

import helpers
import jax
import jax.numpy as jnp
import pytest

from benchmarks import memory, train
from configs import rqtransformer, rqvae
from rq_jax.devices import sharding
from rq_jax.devices.memory import device_bytes
from rq_jax.pretrained import vgg_lpips

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
    with helpers.quick_compilation():
        yield


def measured(tmp_path, *options):
    record = memory.main([*options, f"--out={tmp_path / 'memory.json'}"])
    assert json.loads((tmp_path / "memory.json").read_text()) == record
    return record["results"]


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


@pytest.mark.slow
def test_a_transformer_on_two_meshes(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GIB", 1)
    whole, split = measured(tmp_path, "--preset=demo", "--mesh=8x1x1", "--mesh=1x4x2", "--batch=16")
    assert (whole["config"]["mesh"], split["config"]["mesh"]) == ("8x1x1", "1x4x2")
    for found, sizes in ((whole, {"data": 8}), (split, {"data": 1, "fsdp": 4, "tensor": 2})):
        state = drawn_state({"stage": 2, "preset": "demo"}, sharding.make_mesh(**sizes))
        gib = found["gib_per_device"]
        assert gib["parameters"] == fullest(state.params) == device_bytes(state.params)
        assert gib["optimizer"] == fullest(state.opt_state) and gib["average"] == fullest(state.ema_params)
        assert gib["temporaries"] > 0 and gib["total"] == sum(gib[name] for name in memory.COLUMNS[:-1])
    assert split["gib_per_device"]["parameters"] < 0.4 * whole["gib_per_device"]["parameters"]


@pytest.mark.slow
def test_a_tokenizer_and_a_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GIB", 1)
    (found,) = measured(tmp_path, "--stage=1", "--preset=demo", "--mesh=2x4x1", "--batch=8")
    state = drawn_state({"stage": 1, "preset": "demo"}, sharding.make_mesh(data=2, fsdp=4))
    gib = found["gib_per_device"]
    assert gib["parameters"] == fullest(state.params) and gib["average"] == fullest(state.ema_params)
    assert gib["other state"] == fullest((state.model_state, state.discriminator, state.discriminator_opt_state))
    assert gib["frozen"] == device_bytes(vgg_lpips.abstract_variables())
    (drawn,) = measured(tmp_path, "--sample", "--preset=demo", "--batch=2")
    assert 0 < drawn["gib_per_device"]["parameters"] < drawn["gib_per_device"]["total"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--mesh=3x1x1"], "does not fit 8 devices"),
        (["--mesh=2x1"], "--mesh: '2x1' is no mesh; give data x fsdp x tensor, such as 1x8x1"),
        (["--mesh=8x1x1", "--batch=12"], "data.batch_size: 12 is not a multiple of 8"),
    ],
)
def test_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        memory.main(["--preset=demo", *options])
    assert error.value.code == 2 and message in capsys.readouterr().err
