"""Images of codes as bytes, and the settings of a draw."""

import contextlib
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_dqtransformer

from benchmarks import hlo
from rq_jax.devices import sharding
from rq_jax.sampling import generate, images

MODEL = SimpleNamespace(code_shape=(2, 4, 3), use_null_cond=True)


class Decoder(nn.Module):
    """A tokenizer whose images are its codes, in tenths."""

    dtype: str = "float32"

    def decode_codes(self, codes):
        return jnp.where(codes == 99, jnp.nan, codes / 10)


def test_images_are_clipped_and_never_wrap_around():
    codes = jnp.array([-30, -11, -10, 0, 10, 11, 30, 99], jnp.int32)
    found = images.decode(Decoder(), {}, codes)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, [0, 0, 0, 128, 255, 255, 255, 0])
    unrounded = images.decode(Decoder(), {}, codes[:, None], 1, False)
    np.testing.assert_array_equal(unrounded[:, 0], np.float32([-1, -1, -1, 0, 1, 1, 1, -1]))


class Halves(nn.Module):
    """A tokenizer that says in which dtype it decodes."""

    dtype: str = "float32"

    def decode_codes(self, codes):
        return codes.astype(self.dtype) * 0.5


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_program_is_that_of_the_platform_that_runs_it(num_parts):
    """And not of the one that traces it."""
    codes = jnp.zeros((4, 3), jnp.int32)
    traced = images.decode.trace(Halves(), {}, codes, num_parts)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    assert {name: "bf16" in text for name, text in texts.items()} == {"cpu": False, "tpu": True, "cuda": True}
    unrounded = images.decode.trace(Halves(), {}, codes, num_parts, False)
    assert "bf16" not in unrounded.lower(lowering_platforms=("tpu",)).as_text()


def test_parts_of_a_batch_are_decoded_where_they_lie():
    codes = np.random.default_rng(0).integers(-12, 13, (48, 3, 2, 1)).astype(np.int32)
    layout = sharding.batch_sharding(sharding.local_mesh())
    compiled = images.decode.lower(Decoder(), {}, jax.device_put(codes, layout), 3).compile()
    counts = hlo.count_compiled(compiled.as_text()).ops
    assert counts["while"] and not hlo.collectives(compiled.as_text())
    found = compiled({}, jax.device_put(codes, layout))
    assert found.sharding.is_equivalent_to(layout, 4)
    np.testing.assert_array_equal(found, images.decode(Decoder(), {}, codes))


@pytest.mark.parametrize(
    "batch_size, decode_batch_size, devices, drawn, parts",
    [
        (36, None, 1, 36, 2),
        (33, None, 1, 33, 3),
        (36, None, 8, 40, 1),
        (500, None, 8, 504, 3),
        (500, 100, 8, 504, 7),
        (3, 1, 8, 8, 1),
        (3, 1, 1, 3, 3),
    ],
)
def test_batches_are_rounded_up_to_what_devices_and_parts_share(
    monkeypatch, batch_size, decode_batch_size, devices, drawn, parts
):
    seen = {}
    monkeypatch.setattr(images, "_for_inference", lambda *args: {})
    monkeypatch.setattr(images, "generate", lambda *args, image_ids, **_: jnp.asarray(image_ids))

    def decode(model, variables, codes, num_parts, as_bytes):
        seen.update(drawn=len(codes), parts=num_parts)
        return codes

    monkeypatch.setattr(images, "decode", decode)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "data")
    sizes = dict(num_images=2, batch_size=batch_size, decode_batch_size=decode_batch_size)
    sizes["sharding"] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    ((ids, _, _),) = images.draw(None, None, SimpleNamespace(model=None, variables={}), **sizes)
    assert seen == {"drawn": drawn, "parts": parts} and ids.tolist() == [0, 1]


@pytest.mark.parametrize("devices", [1, 8])
def test_codes_at_hand_are_decoded_batch_by_batch(devices):
    codes = np.random.default_rng(0).integers(-9, 10, (11, 3, 2, 1)).astype(np.int32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "data")
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tokenizer = SimpleNamespace(model=Decoder(), variables={})
    batches = list(images.decode_all(tokenizer, codes, batch_size=5, decode_batch_size=2, sharding=layout))
    assert [len(batch) for batch in batches] == ([5, 5, 1] if devices == 1 else [8, 3])
    np.testing.assert_array_equal(np.concatenate(batches), images.decode(Decoder(), {}, codes))


def test_only_the_first_batch_is_told_to_compile(monkeypatch):
    events = []
    monkeypatch.setattr(images, "_for_inference", lambda *args: None)
    monkeypatch.setattr(
        images, "generate", lambda *args, image_ids, **_: events.append(list(image_ids)) or jnp.asarray(image_ids)
    )
    monkeypatch.setattr(images, "decode", lambda model, variables, codes, *_: events.append("decoded") or codes)

    @contextlib.contextmanager
    def compiling():
        events.append("compiles")
        yield
        events.append("compiled")

    tokenizer = SimpleNamespace(model=None, variables={})
    batches = list(images.draw(None, None, tokenizer, num_images=3, batch_size=2, first_index=4, compiling=compiling))
    assert events == ["compiles", [4, 5], "decoded", "compiled", [6, 7], "decoded"]
    assert [ids.tolist() for ids, _, _ in batches] == [[4, 5], [6]]


def test_flags_go_before_what_the_checkpoint_recorded():
    recorded = {"temperature": [0.5, 0.6, 0.7], "top_k": None, "top_p": 0.9, "guidance": 2.0}
    given = {"temperature": None, "top_k": 4, "top_p": None, "guidance": 1.5}
    found = images.draw_settings(MODEL, recorded, given)
    assert found == {"temperature": [0.5, 0.6, 0.7], "top_k": 4, "top_p": 0.9, "guidance": 1.5}


@pytest.mark.parametrize(
    "recorded, given, message",
    [
        ({}, {"temperature": [0.5, 0.6]}, "--temperature: [0.5, 0.6] has 2 entries for code depth 3; give one per depth"),
        ({"top_p": (0.5, 0.6)}, {}, "sample.top_p: (0.5, 0.6) has 2 entries for code depth 3"),
        ({"top_k": 3}, {"top_k": 0}, "--top_k: 0 must be at least 1"),
        ({"top_p": 1.5}, {"top_p": None}, "sample.top_p: 1.5 is outside [0, 1]"),
        ({}, {"guidance": float("nan")}, "--guidance: nan must be a finite number"),
        ({"nonsense": 1}, {}, "sample: the key: 'nonsense' is unknown; allowed are 'temperature', "),
    ],
)  # fmt: skip
def test_settings_are_refused_by_the_name_that_the_user_knows(recorded, given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        images.draw_settings(MODEL, recorded, given)


# --- packed codes ---------------------------------------------------------------------------------


class DenseDecoder(nn.Module):
    """A tokenizer with grains, whose images are its codes, in tenths."""

    dtype: str = "float32"

    def decode_codes(self, codes):
        return codes.codes / 10


def test_images_of_packed_codes_take_grain_maps_in_turn():
    model, variables = toy_dqtransformer.build(code_shape=(2, 6, 1), content_layers=1)
    maps = np.array([[[0, 1, 0]], [[1, 0, 1]]])
    tokenizer = SimpleNamespace(model=DenseDecoder(), variables={})
    drawn = list(
        images.draw(model, variables, tokenizer, num_images=5, batch_size=3, decode_batch_size=1, grains=maps, seed=5)
    )
    ids = np.concatenate([of_batch[0] for of_batch in drawn])
    codes = jax.tree.map(lambda *parts: np.concatenate(parts), *(of_batch[1] for of_batch in drawn))
    np.testing.assert_array_equal(ids, np.arange(5))
    np.testing.assert_array_equal(codes.grains, maps[ids % 2])
    expected = generate(model, variables, jax.random.key(5), 3, image_ids=[3, 4, 5], grains=maps[[1, 0, 1]])
    np.testing.assert_array_equal(codes.codes[3:], expected.codes[:2])
    pictures = np.concatenate([of_batch[2] for of_batch in drawn])
    np.testing.assert_array_equal(pictures, np.round(np.clip(codes.codes / 20 + 0.5, 0, 1) * 255))


def test_settings_of_positions_are_those_of_packed_codes():
    model, _ = toy_dqtransformer.build()
    given = {"temperature": None, "position_top_k": 3, "position_top_p": None}
    found = images.draw_settings(model, {"position_temperature": 0.5, "top_p": 0.9}, given)
    assert found == {"position_temperature": 0.5, "top_p": 0.9, "position_top_k": 3}
    for recorded, given, message in (
        ({}, {"position_top_p": 1.5}, r"--position_top_p: 1.5 is outside \[0, 1\]"),
        ({"position_top_k": 0}, {}, "sample.position_top_k: 0 must be at least 1"),
        ({}, {"position_top_k": [1, 2]}, r"--position_top_k: \[1, 2\] has shape \(2,\); give one value"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            images.draw_settings(model, recorded, given)
    with pytest.raises(
        ValueError, match="^--position_top_k: 3 is of positions, and this model draws none; leave it out"
    ):
        images.draw_settings(MODEL, {}, {"position_top_k": 3})
    with pytest.raises(ValueError, match="^sample: the key: 'position_top_k' is unknown; allowed are 'temperature', "):
        images.draw_settings(MODEL, {"position_top_k": 3}, {})
