"""One of several processes that save a run together and start others from it: <directory> <host:port> <count> <id>."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from toy_state import RQVAE, model_state_of  # noqa: E402

from rq_jax import checkpoint  # noqa: E402
from rq_jax.devices import sharding  # noqa: E402


def assert_shards(actual, expected):
    """Every device of this process holds its part of what is expected."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(theirs)[shard.index])


def start(directory, mesh, expected, keep_optimizer):
    """A state that starts from the run, checked against the one that was saved."""

    def fresh():
        return model_state_of("rqvae", 0, use_ema=False)

    shapes = sharding.sharded_shapes(mesh, fresh)
    state = jax.jit(fresh, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))()
    started = checkpoint.start_from(directory, state, keep_optimizer)
    assert all(
        leaf.sharding == shape.sharding for leaf, shape in zip(*map(jax.tree.leaves, (started, shapes)), strict=True)
    )
    assert_shards(started.params, expected.params)
    assert_shards(started.model_state, expected.model_state)
    moments = expected if keep_optimizer else fresh()
    assert_shards(started.opt_state[0][0], moments.opt_state[0][0])
    assert int(started.step) == 0


def main(directory, address, count, index):
    jax.distributed.initialize(address, int(count), int(index), shutdown_timeout_seconds=5)
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    expected = model_state_of("rqvae", 3, use_ema=False)
    expected = expected.replace(opt_state=jax.tree.map(lambda x: x + jax.numpy.ones_like(x), expected.opt_state))
    shardings = sharding.state_shardings(mesh, expected)
    saved = jax.jit(lambda: expected, out_shardings=shardings)()
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(saved.params))
    with checkpoint.RunDirectory(directory) as run, checkpoint.Checkpointer(run.address) as checkpointer:
        checkpoint.write_config(run.path, {"model": RQVAE})
        checkpointer.save(saved, {})
        checkpointer.wait()
    multihost_utils.sync_global_devices("sealed by the first process")
    loaded = checkpoint.load_model(directory).variables
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected.variables)
    for keep_optimizer in (False, True):
        start(directory, mesh, expected, keep_optimizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
