"""The mesh, and where parameters, optimizer moments, codebooks and batches lie on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from benchmarks import hlo
from rq_jax import models
from rq_jax.data.transforms import scale
from rq_jax.devices import sharding
from rq_jax.nn.placement import place
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import apply_gradients, create_state

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight (fake) devices")


# --- the mesh -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
        ({"data": 8, "tensor": -1}, (8, 1, 1)),
    ],
)
def test_make_mesh(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == expected
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("sizes", [(3, 1, 1), (4, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 1), (-1, 0, 1), (-2, -4, 1)])
def test_make_mesh_refuses(sizes):
    sizes = dict(zip(sharding.AXES, sizes, strict=True))
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(**sizes)
    assert str(error.value) == f"mesh: {sizes} does not fit 8 devices; sizes must multiply to it, one may be -1"


@pytest.fixture
def two_slices(monkeypatch):
    """Every other device lies in the second slice."""
    monkeypatch.setattr(sharding, "slice_of", lambda device: device.id % 2)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)])
def test_only_data_goes_over_slices(two_slices, sizes):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)), dcn=2)
    assert mesh.devices.shape == sizes and mesh.axis_names == sharding.AXES
    assert mesh.axis_types == (AxisType.Auto,) * 3 and set(mesh.devices.flat) == set(jax.devices())
    slices = np.vectorize(sharding.slice_of)(mesh.devices).reshape(2, -1)
    assert slices.tolist() == [[0] * 4, [1] * 4]
    assert sharding.make_mesh(data=-1, fsdp=sizes[1], tensor=sizes[2], dcn=2) == mesh


def test_weights_are_gathered_inside_a_slice(two_slices):
    mesh = sharding.make_mesh(data=2, fsdp=4, dcn=2)
    weights = {"up_MF": np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)}
    x_BM = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)

    def step(weights, x_BM):
        def loss(weights):
            whole = jax.lax.with_sharding_constraint(weights["up_MF"], sharding.replicated(mesh))
            return jnp.mean(jnp.sin(x_BM @ whole) ** 2)

        return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

    layout = sharding.state_shardings(mesh, weights)
    placed = jax.device_put(weights, layout), sharding.put_batch(mesh, x_BM)
    program = jax.jit(step, out_shardings=layout).lower(*placed).compile()
    np.testing.assert_allclose(program(*placed)["up_MF"], jax.jit(step)(weights, x_BM)["up_MF"], rtol=1e-5)
    slices = [sharding.slice_of(device) for device in mesh.devices.flat]
    over = {}
    for each in hlo.collectives(program.as_text()):
        over.setdefault(each.opcode, set()).add(len({slices[i] for i in each.group}))
    assert over.pop("all-gather") == {1} and set.union(*over.values()) >= {2}  # gradients alone go over both


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"dcn": 4}, r"mesh.dcn: 4 does not fit slices of [4, 4] devices; set it to 2"),
        ({"dcn": 0}, r"mesh.dcn: 0 does not fit slices of [4, 4] devices; set it to 2"),
        ({"dcn": 2, "data": 1, "fsdp": 8}, "mesh.data: 1 is not a multiple of mesh.dcn 2, the slices; set it to one"),
    ],
)
def test_slices_that_do_not_fit_are_refused(two_slices, sizes, message):
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(**sizes)
    assert str(error.value) == message


def test_slices_of_several_sizes_and_devices_of_none_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^mesh.dcn: 2 does not fit slices of \[8\] devices; set it to 1$"):
        sharding.make_mesh(dcn=2)
    monkeypatch.setattr(sharding, "slice_of", lambda device: int(device.id > 5))
    with pytest.raises(ValueError, match=r"^mesh.dcn: 2 does not fit slices of \[6, 2\] devices; set it to 1$"):
        sharding.make_mesh(dcn=2)


# --- names to axes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, ndim, letters",
    [
        ([DictKey("params"), DictKey("up_MF")], 2, "MF"),
        ([DictKey("up_MF")], 3, "-MF"),  # the layer axis of a scan
        ([DictKey("qkv_M3NA")], 4, "M3NA"),
        ([DictKey("classifier_bias_DK")], 2, "DK"),
        ([DictKey("kernel")], 4, "--IO"),
        ([DictKey("kernel")], 2, "IO"),
        ([DictKey("scale")], 1, "-"),
        ([DictKey("codebook_KE"), SequenceKey(1)], 2, "--"),  # one of several codebooks
        ([GetAttrKey("mu"), DictKey("down_FM")], 2, "FM"),
        ([GetAttrKey("counts_K")], 1, "K"),
        ([GetAttrKey("step")], 0, ""),
        ([], 2, "--"),
    ],
)
def test_logical_axes_are_the_letters_of_the_name(path, ndim, letters):
    assert sharding.logical_axes(path, ndim) == letters


def spec_of(mesh, name, *shape):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.state_shardings(mesh, {name: leaf})[name].spec


@pytest.mark.parametrize(
    "sizes, name, shape, expected",
    [
        ((8, 1, 1), "up_MF", (8, 16), (None, None)),
        ((1, 8, 1), "up_MF", (8, 16), ("fsdp", None)),
        ((1, 1, 8), "up_MF", (8, 16), (None, "tensor")),
        ((2, 2, 2), "up_MF", (3, 8, 16), (None, "fsdp", "tensor")),
        ((2, 2, 2), "qkv_M3NA", (8, 3, 4, 2), ("fsdp", None, "tensor", None)),
        ((2, 2, 2), "kernel", (3, 3, 6, 8), (None, None, None, ("fsdp", "tensor"))),
        ((2, 2, 2), "kernel", (3, 3, 6, 10), (None, None, None, "fsdp")),  # both do not fit
        ((4, 1, 2), "kernel", (3, 3, 6, 10), (None, None, None, "tensor")),
        ((1, 4, 2), "kernel", (3, 3, 6, 10), (None, None, None, "tensor")),
        ((1, 4, 2), "kernel", (3, 3, 8, 3), (None, None, None, None)),
        ((2, 2, 2), "table_KV", (4, 6), ("tensor", None)),  # an axis is used once
        ((2, 2, 2), "table_KV", (5, 6), (None, "tensor")),  # and stays free where it does not fit
        ((2, 2, 2), "square_MM", (6, 6), ("fsdp", None)),
        ((1, 4, 2), "up_MF", (6, 7), (None, None)),  # not divisible
        ((1, 4, 2), "up_MF", (4, 7), ("fsdp", None)),
        ((2, 2, 2), "position_TM", (15, 8), (None, "fsdp")),
        ((2, 2, 2), "scale", (8,), (None,)),
        ((2, 2, 2), "step", (), ()),
    ],
)
def test_rules_give_each_axis_its_devices(sizes, name, shape, expected):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    assert spec_of(mesh, name, *shape) == P(*expected)


# --- whole states -------------------------------------------------------------------------------------------

MODEL = models.create(
    "rqtransformer", codebook_size=6, code_shape=(3, 5, 4), code_dim=10, model_dim=8, num_heads=2,
    spatial_layers=2, depth_layers=1, cond_vocab_size=12, use_shared_classifier=False,
)  # fmt: skip
OPTIMIZER = make_optimizer(name="adamw", learning_rate=0.1, total_steps=9, weight_decay=0.1, clip_norm=1.0)


def init(rng):
    variables = models.init_variables(MODEL, rng)
    variables["codebook"]["codebook_KE"] = jnp.ones((6, 10))
    return create_state(variables, OPTIMIZER, rng, use_ema=True)


SHAPES = jax.eval_shape(init, jax.random.key(0))
MESHES = {"data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (4, 1, 2), "all": (2, 2, 2)}


@pytest.fixture(params=MESHES)
def mesh(request):
    return sharding.make_mesh(**dict(zip(sharding.AXES, MESHES[request.param], strict=True)))


def axes_used(shardings):
    return {axis for sharding in jax.tree.leaves(shardings) for axis in sharding.spec if axis}


def test_moments_and_average_lie_where_their_parameters_lie(mesh):
    shardings = sharding.state_shardings(mesh, SHAPES)
    (adam,) = [s for s in jax.tree.leaves(shardings.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(SHAPES.params)
    assert shardings.params == adam.mu == adam.nu == shardings.ema_params
    expected = {name for name in ("fsdp", "tensor") if mesh.shape[name] > 1}
    assert axes_used(shardings.params) == expected
    for leaf, placed in zip(jax.tree.leaves(SHAPES), jax.tree.leaves(shardings), strict=True):
        placed.shard_shape(leaf.shape)  # raises where an axis does not divide


def test_counters_keys_and_codebook_are_replicated(mesh):
    shardings = sharding.state_shardings(mesh, SHAPES)
    separate = {"codebook": {"codebook_KE": (jnp.ones((8, 2)), jnp.ones((4, 2))), "counts_K": jnp.ones(8)}}
    rest = (shardings.step, shardings.rng, shardings.skipped_steps, shardings.model_state)
    assert axes_used((rest, sharding.state_shardings(mesh, separate))) == set()
    assert sharding.replicated(mesh).is_fully_replicated


def draw_and_update(rng):
    """A small state, drawn and updated once."""
    names = {"up_MF": (8, 6), "kernel": (3, 3, 4, 2), "scale": (5,)}
    params = {name: jax.random.normal(jax.random.fold_in(rng, len(name)), shape) for name, shape in names.items()}
    state = create_state({"params": params}, OPTIMIZER, rng, use_ema=True)
    return apply_gradients(state, OPTIMIZER, params, jnp.float32(1.0), {}, 0.9)[0]


def test_a_state_is_the_same_on_every_mesh(mesh):
    rng = jax.random.key(0)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(draw_and_update, rng))
    placed, alone = jax.jit(draw_and_update, out_shardings=shardings)(rng), jax.jit(draw_and_update)(rng)
    assert placed.rng == alone.rng
    for leaf, expected, where in zip(*map(jax.tree.leaves, (placed, alone, shardings)), strict=True):
        assert leaf.sharding == where
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)


TOKENIZER = models.create(
    "rqvae", image_size=8, width=16, width_multipliers=(1, 2), num_res_blocks=1, norm_groups=4, attention_resolutions=(4,),
    z_channels=8, code_dim=8, codebook_size=5, code_shape=(4, 4, 2), use_remat=False,
)  # fmt: skip


def tokenizer_loss(params, rest, batch):
    variables = {"params": params, **rest}
    latents = TOKENIZER.apply(variables, batch["image"], method="encode")
    return jnp.mean((TOKENIZER.apply(variables, latents, method="decode") - batch["image"]) ** 2)


def transformer_loss(params, rest, batch):
    variables = {"params": params, **rest}
    context, _, _ = MODEL.apply(variables, batch["codes"], batch["cond"], method="spatial")
    hidden, _ = MODEL.apply(variables, context, batch["codes"], method="depth")
    return jnp.mean(jnp.sin(hidden))


@functools.cache
def gradients_of_one_device(model, loss):
    """(parameters, the other variables, a batch, gradients)."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32),
        "codes": rng.integers(0, 6, (8, 3, 5, 4)),
        "cond": rng.integers(0, 12, (8, 1)),
    }
    # As they begin, some are zero, and so are the gradients of what is behind them.
    rest = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), models.abstract_variables(model))
    params = rest.pop("params")
    return params, rest, batch, jax.jit(jax.grad(loss))(params, rest, batch)


@pytest.mark.parametrize(
    "model, loss", [(TOKENIZER, tokenizer_loss), (MODEL, transformer_loss)], ids=["stage 1", "stage 2"]
)
def test_gradients_are_those_of_one_device_on_every_mesh(mesh, model, loss):
    """Two convolutions in a row are what XLA's partitioner once got wrong."""
    params, rest, batch, expected = gradients_of_one_device(model, loss)
    shardings = sharding.state_shardings(mesh, params)
    placed = jax.device_put(params, shardings), jax.device_put(rest, sharding.replicated(mesh))
    found = jax.jit(jax.grad(loss), out_shardings=shardings)(*placed, sharding.put_batch(mesh, batch))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


# --- batches ------------------------------------------------------------------------------------------------


def test_put_batch_splits_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"image": np.arange(8.0 * 3).reshape(8, 3), "mask": np.arange(8) < 5}
    placed = sharding.put_batch(mesh, batch)
    for name, array in placed.items():
        assert array.sharding == NamedSharding(mesh, P(("data", "fsdp")))
        assert array.dtype == jax.dtypes.canonicalize_dtype(batch[name].dtype)
        np.testing.assert_array_equal(array, batch[name])
    rows = {(shard.index[0].start, shard.data.shape) for shard in placed["image"].addressable_shards}
    assert rows == {(start, (2, 3)) for start in (0, 2, 4, 6)}
    assert sharding.batch_sharding(mesh) == placed["mask"].sharding


def test_put_batch_leaves_what_is_on_all_devices():
    mesh = sharding.make_mesh()
    whole = jax.device_put(np.arange(3), sharding.replicated(mesh))
    placed = sharding.put_batch(mesh, {"whole": whole, "rows": np.arange(8), "on the first": jnp.arange(8)})
    assert placed["whole"] is whole
    assert placed["rows"].sharding == placed["on the first"].sharding == sharding.batch_sharding(mesh)


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class Placed:
    """A mesh of devices of several processes."""

    def __init__(self, sizes, processes):
        self.shape = dict(zip(sharding.AXES, sizes, strict=True))
        self.devices = np.array([Device(process) for process in processes], object).reshape(sizes)


@pytest.mark.parametrize(
    "sizes, processes, expected",
    [
        ((4, 1, 1), [0, 1, 2, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 2, 1), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((2, 1, 2), [0, 0, 1, 1], [(0, 2), (1, 2)]),
        ((1, 1, 4), [0, 0, 1, 1], [(0, 1), (0, 1)]),  # both need the whole batch
        ((2, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((4, 1, 1), [1, 1, 0, 0], [(1, 2), (0, 2)]),  # in the order of the mesh, whoever comes first
    ],
)
def test_processes_along_tensor_read_the_same_part(monkeypatch, sizes, processes, expected):
    mesh = Placed(sizes, processes)
    for process, part in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        sharding.batch_part.cache_clear()
        assert sharding.batch_part(mesh) == part


@pytest.mark.parametrize("sizes, processes", [((2, 1, 3), [0, 0, 1, 1, 2, 2]), ((4, 1, 1), [0, 1, 1, 0])])
def test_parts_that_overlap_are_refused(sizes, processes):
    with pytest.raises(
        ValueError, match=r"^mesh: {'data': .*} over \d processes gives some of them parts .* overlap; let tensor"
    ):
        sharding.batch_part(Placed(sizes, processes))


def test_check_batch_size():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.check_batch_size(mesh, 12)
    sharding.check_batch_size(mesh, 12, 3)
    with pytest.raises(ValueError) as error:
        sharding.check_batch_size(mesh, 12, 2)
    assert str(error.value) == (
        "data.batch_size: 12 is not a multiple of 8 (devices along data and fsdp times optim.accumulation_steps 2)"
    )
    with pytest.raises(ValueError, match="data.batch_size: 6 is not a multiple of 4 "):
        sharding.check_batch_size(mesh, 6)


def test_activations_lie_as_their_letters_say():
    mesh, x = sharding.make_mesh(data=2, fsdp=2, tensor=2), jnp.zeros((8, 6, 4))

    def spec(letters, without=()):
        with sharding.activations(mesh, without):
            return jax.jit(lambda x: place(x, letters))(x).sharding.spec

    assert spec("BSM") == P(("data", "fsdp"))  # fsdp is used up
    assert spec("-SM") == P(None, None, "fsdp")
    assert spec("B-K") == P(("data", "fsdp"), None, "tensor")
    assert spec("BSM", without=("data", "fsdp")) == P()
    assert place(x, "BSM") is x  # outside


def test_gradients_of_parts_are_summed_over_devices_once():
    """Those of two micro-batches: two sums over devices otherwise."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    weights = {"up_MF": np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)}
    x_BM = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)

    def gradient(weights, x_BM):
        return jax.grad(lambda w: jnp.mean(jnp.sin(x_BM @ w["up_MF"]) ** 2))(weights)

    @jax.jit
    def in_parts(weights, x_BM):
        gradients = [
            sharding.over_parts(mesh, functools.partial(gradient, weights), part) for part in (x_BM[::2], x_BM[1::2])
        ]
        assert gradients[0]["up_MF"].shape == (4, 6, 10)
        return sharding.mean_over_parts(mesh, jax.tree.map(lambda a, b: (a + b) / 2, *gradients))

    program = in_parts.lower(jax.device_put(weights, sharding.state_shardings(mesh, weights)), x_BM).compile()
    found = program(jax.device_put(weights, sharding.state_shardings(mesh, weights)), x_BM)["up_MF"]
    assert found.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_allclose(found, gradient(weights, x_BM)["up_MF"], rtol=1e-5, atol=1e-7)
    sums = [each for each in hlo.collectives(program.as_text()) if each.opcode in ("all-reduce", "reduce-scatter")]
    assert len(sums) == 1 and sums[0].group_size == 4


def test_bytes_become_the_hosts_floats_on_the_devices():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1)
    placed = sharding.put_batch(sharding.make_mesh(data=4, fsdp=2), {"image": pixels, "index": np.arange(16)})
    assert placed["image"].dtype == jnp.float32 and placed["image"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(np.asarray(placed["image"]).view(np.int32), scale(pixels).view(np.int32))
    np.testing.assert_array_equal(placed["index"], np.arange(16))


def test_weights_that_every_chunk_uses_have_their_gradient_summed_over_devices_once():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    weights = {
        "up_MF": np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32),
        "unused_M": np.ones(6, np.float32),
    }
    x_BSM = np.random.default_rng(1).normal(size=(8, 5, 6)).astype(np.float32)

    def by_image(weights, x_BSM):
        """Over positions one after the other, as a loss over chunks."""
        add = lambda sum_B, x_BM: (sum_B + (jnp.sin(x_BM @ weights["up_MF"]) ** 2).sum(1), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros(len(x_BSM)), x_BSM.swapaxes(0, 1))[0]

    def gradient(run, weights, x_BSM):
        return jax.grad(lambda weights: run(by_image, weights, x_BSM).mean())(weights)

    run = functools.partial(sharding.with_copies, mesh)
    placed = jax.device_put(weights, sharding.state_shardings(mesh, weights)), sharding.put_batch(mesh, x_BSM)
    np.testing.assert_allclose(run(by_image, *placed), by_image(weights, x_BSM), rtol=1e-5)
    program = jax.jit(functools.partial(gradient, run)).lower(*placed).compile()
    found, wanted = program(*placed), gradient(lambda f, *args: f(*args), weights, x_BSM)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, wanted)
    sums = [each for each in hlo.collectives(program.as_text()) if each.opcode in ("all-reduce", "reduce-scatter")]
    assert [(each.times, each.group_size) for each in sums] == [(1, 4)]


def test_micro_batches_take_less_memory_and_move_nothing():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    x_BE = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    weights_EF = np.random.default_rng(1).normal(size=(3, 5000)).astype(np.float32)

    def encode(batch):
        return {"y": jnp.sin(batch["x"] @ weights_EF).reshape(-1, 50, 100).sum(1)}

    def compiled(num_steps):
        over = functools.partial(sharding.map_micro_batches, encode, num_steps=num_steps)
        rows = sharding.batch_sharding(mesh)
        return jax.jit(over, in_shardings=rows, out_shardings=rows).lower({"x": x_BE}).compile()

    whole, parts = compiled(1), compiled(4)
    placed = sharding.put_batch(mesh, {"x": x_BE})
    np.testing.assert_allclose(parts(placed)["y"], whole(placed)["y"], rtol=1e-5)
    assert not any(name in parts.as_text() for name in ("all-", "collective-permute", "reduce-scatter"))
    whole, parts = (program.memory_analysis().temp_size_in_bytes for program in (whole, parts))
    assert parts < whole / 3


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_muon_gathers_a_matrix_once(sizes):
    """Its fifteen products would: eleven times the weights. Six layers, which eight devices do not divide."""
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    shapes = {"up_MF": (6, 16, 64), "qkv_M3NA": (6, 16, 3, 4, 8), "out_NAM": (6, 4, 8, 16), "kernel": (3, 3, 8, 16)}
    rng = np.random.default_rng(0)
    params, grads = ({n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(2))
    settings = dict(learning_rate=0.1, total_steps=9, schedule="constant", weight_decay=0.1)
    transform = make_optimizer(name="muon", **settings).transform
    lie = functools.partial(sharding.state_shardings, mesh)

    def update(params, grads):
        with sharding.activations(mesh):
            return transform.update(grads, transform.init(params), params)

    compiled = jax.jit(update, out_shardings=lie(jax.eval_shape(update, params, grads)))
    args = [jax.device_put(tree, lie(tree)) for tree in (params, grads)]
    program = compiled.lower(*args).compile()
    moved = sum(each.times * each.bytes for each in hlo.collectives(program.as_text()))
    assert moved < 3 * sum(x.nbytes for x in params.values())
    found, expected = program(*args)[0], transform.update(grads, transform.init(params), params)[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
