"""What the compiled steps of both stages move between eight devices, hold on each, and compute on each."""

import functools
import math
from typing import NamedTuple

import helpers
import jax
import pytest

from benchmarks import hlo
from benchmarks.train import batch_shapes, compile_step
from rq_jax import checkpoint, losses, models, recipes
from rq_jax.devices import sharding
from rq_jax.recipes.adversary import Adversary
from rq_jax.recipes.tokenizer import Losses as TokenizerLosses
from rq_jax.training.optimizer import make_optimizer

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight (fake) devices")

# Images of a forward pass. No axis of a parameter is a multiple of 7, so that every array that has one is activations:
# of the whole batch where it is a multiple of 56, which no device's part of the images or of their 3 x 5 positions is.
B = 56
TOKENIZER = models.create(
    "rqvae", image_size=(12, 20), code_shape=(3, 5, 3), code_dim=16, codebook_size=64, width=16, width_multipliers=(1, 2, 2),
    num_res_blocks=1, norm_groups=4, attention_resolutions=(), z_channels=8, use_remat=True,
)  # fmt: skip
TRANSFORMER = models.create(
    "rqtransformer", codebook_size=64, code_shape=(3, 5, 3), code_dim=16, model_dim=64, num_heads=4, spatial_layers=3,
    depth_layers=2, cond_vocab_size=10, use_remat=True,
)  # fmt: skip
GRAINED = models.create(
    "dqvae", image_size=(8, 20), num_grains=2, router="random", code_dim=16, codebook_size=64, width=16,
    width_multipliers=(1, 1, 2), num_res_blocks=1, norm_groups=4, attention_resolutions=(), z_channels=8, use_remat=True,
)  # fmt: skip
PACKED = models.create(
    "dqtransformer", codebook_size=64, code_shape=(4, 10, 1), num_grains=2, code_dim=16, model_dim=64, num_heads=4,
    position_layers=2, content_layers=2, cond_vocab_size=10, use_remat=True,
)  # fmt: skip
DISCRIMINATOR = models.create("discriminator", width=16, num_layers=1)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2), "all": (2, 2, 2)}


class Compiled(NamedTuple):
    """A step: its collectives, bytes of temporaries and operations on a device, bytes of what its gradients are of."""

    collectives: list[hlo.Collective]
    temporaries: int
    flops: float
    gradients: int


def transformer_recipe(mesh, num_steps, is_packed=False, **options):
    options = {"name": "adamw", "learning_rate": 0.1, "total_steps": 9, "accumulation_steps": num_steps, **options}
    optimizer = make_optimizer(**options)
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.replicated(mesh))
    kind, model, frozen = (
        (recipes.DQTransformer, PACKED, GRAINED) if is_packed else (recipes.Transformer, TRANSFORMER, TOKENIZER)
    )
    variables = jax.tree.map(lambda x: whole(x.shape, x.dtype), models.abstract_variables(frozen))
    tokenizer = checkpoint.LoadedModel(frozen, {}, {}, None)
    return kind(model, tokenizer, optimizer, kind.losses_class(), mesh, tokenizer_variables=variables)


def tokenizer_recipe(mesh):
    optimizer = make_optimizer(learning_rate=0.1, total_steps=9)
    losses, adversary = TokenizerLosses(adversarial_weight=0.5), Adversary(DISCRIMINATOR, optimizer, 0.5)
    return recipes.Tokenizer(TOKENIZER, optimizer, losses, adversary, mesh=mesh)


@functools.cache
def compiled(stage, sizes, num_steps=1, **options):
    mesh = helpers.make_mesh(*sizes)
    recipe = tokenizer_recipe(mesh) if stage == 1 else transformer_recipe(mesh, num_steps, **options)
    state = recipe.abstract_state()
    program = compile_step(recipe, state, batch_shapes(recipe, B * num_steps))
    text = program.call.as_text()
    gradients = state.params
    if stage == 1:
        # The discriminator has one for real images and one for reconstructions, the codebook two sums at each depth.
        tables = [TOKENIZER.code_shape[-1] * [state.model_state["codebook"]["codebook_KE"]]] * 2
        gradients = state.params, [state.discriminator["params"]] * 2, tables
    size = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(gradients))
    return Compiled(hlo.collectives(text), program.memory["temporaries"], hlo.count_compiled(text).flops, size)


@pytest.fixture(autouse=True, scope="module")
def _many_loss_chunks():
    """One for each position: what a loss reduces in every chunk would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_ELEMENTS", 1)
        yield


def axes_of(collective):
    """Of floating-point arrays: codes and conditions may travel."""
    return [size for dtype, shape in collective.arrays if "f" in dtype for size in shape]


def is_of_images(collective):
    return any(size % 7 == 0 for size in axes_of(collective))


def reduced(step):
    """Bytes of gradients and codebook sums that are reduced."""
    return sum(
        each.times * each.bytes
        for each in step.collectives
        if each.opcode in ("all-reduce", "reduce-scatter") and not is_of_images(each)
    )


QUICK = [(1, "all", 1), (2, "fsdp", 1)]  # each takes ten seconds to compile
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in [*((stage, name, 1) for stage in (1, 2) for name in MESHES), *((2, name, 4) for name in MESHES)]
]


def test_of_packed_codes_nothing_travels_but_gradients_once_an_update():
    step = compiled(2, MESHES["data"], 4, is_packed=True)
    assert [each for each in step.collectives if is_of_images(each)] == []
    assert {(each.opcode, each.times) for each in step.collectives} == {("all-reduce", 1)}
    assert step.gradients <= reduced(step) <= step.gradients + 1000  # and sums of losses


@pytest.mark.parametrize("stage, mesh, num_steps", CASES)
def test_no_collective_carries_the_whole_batch(stage, mesh, num_steps):
    step = compiled(stage, MESHES[mesh], num_steps)
    assert step.collectives
    assert [each for each in step.collectives if any(size % B == 0 for size in axes_of(each))] == []
    if mesh in ("data", "fsdp") or stage == 1:
        # Rows of a table that is split by width are handed to whose images they are of; nothing else of images travels.
        assert {each.opcode for each in step.collectives if is_of_images(each)} <= {"all-to-all"}


@pytest.mark.parametrize("stage, mesh, num_steps", CASES)
def test_gradients_are_reduced_once_an_update(stage, mesh, num_steps):
    step = compiled(stage, MESHES[mesh], num_steps)
    # Along tensor each device has half of most.
    assert step.gradients * (0.95 if mesh in ("data", "fsdp") else 0.45) < reduced(step) < 1.1 * step.gradients


@pytest.mark.parametrize("stage, mesh, num_steps", CASES)
def test_devices_share_operations_and_memory(stage, mesh, num_steps):
    one, step = compiled(stage, (1, 1, 1), num_steps), compiled(stage, MESHES[mesh], num_steps)
    assert step.flops == pytest.approx(one.flops / 8, rel=0.05)
    # Beside its share of the activations a device holds gradients, and the residual stream along tensor is whole.
    assert step.temporaries < one.temporaries / (8 if mesh in ("data", "fsdp") else 5) + 2.5 * step.gradients


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_sharded_gradients_take_their_share_of_memory_for_a_sum_a_micro_batch(mesh):
    num_steps, fsdp, tensor = 4, *MESHES[mesh][1:]
    whole, step = (compiled(2, MESHES[mesh], num_steps, use_sharded_gradients=use) for use in (False, True))
    # Two of a gradient's sizes fall by the devices along fsdp.
    saved = whole.temporaries - step.temporaries
    assert saved > 1.5 * step.gradients / tensor * (1 - 1 / fsdp)
    assert [each for each in step.collectives if any(size % B == 0 for size in axes_of(each))] == []
    # Along fsdp once a micro-batch, the classifier's too, and along data once an update.
    assert reduced(step) < 1.1 * (num_steps + 1 / fsdp) * step.gradients
    assert step.flops == pytest.approx(whole.flops, rel=0.05)
