"""CLIP against OpenAI's code: both towers of a narrow network, and token ids of awkward captions."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_extractor_goldens as maker

from rq_jax.pretrained import clip, clip_text, preprocess

NARROW = clip.Sizes(24, 224, 32, 128, 2, 49408, 77, 64, 2)
HAS_VOCABULARY = all(importlib.util.find_spec(name) for name in ("open_clip", "ftfy", "tokenizers"))


@pytest.fixture(scope="module")
def golden():
    return maker.read("clip")


@pytest.fixture(scope="module")
def net(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.npz"
    np.savez(path, **maker.draw_state(golden[0]))
    return clip.load(path, NARROW)


def run(net, images, tokens):
    @jax.jit
    def outputs(variables, images, tokens):
        features, text_features = net.features(variables, images), net.text_features(variables, tokens)
        logits = net.logits(variables, features, text_features)
        return {"features": features, "text_features": text_features, "logits": logits}

    return outputs(net.variables, images, tokens)


def assert_close(found, expected):
    """Within 1e-4 of the largest value."""
    for name, array in found.items():
        np.testing.assert_allclose(
            array, expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max(), err_msg=name
        )


def import_original():
    torch = pytest.importorskip("torch")
    if not all(importlib.util.find_spec(name) for name in ("torchvision", "clip", "ftfy")):
        pytest.skip("needs torchvision and clip")
    maker.import_torchvision()
    return torch


def as_bytes(images):
    return np.floor((images + 1) * 127.5 + 0.5) / np.float32(127.5) - np.float32(1)


def test_both_towers_give_the_outputs_of_the_original(golden, net):
    assert_close(run(net, as_bytes(maker.draw_image(*maker.IMAGE_SIZE)), golden[1]["tokens"]), golden[1])


@pytest.mark.slow
def test_the_published_sizes_give_the_outputs_of_the_original(tmp_path):
    import_original()
    sizes = clip.VIT_B32
    network = maker.load_random(maker.clip((512, 224, 12, 768, 32, 77, 49408, 512, 12)))
    np.savez(tmp_path / "clip.npz", **maker.draw_state(maker.shapes_of(network)))
    net = clip.load(tmp_path / "clip.npz")
    assert net.sizes == sizes
    for size in ((224, 224), (32, 32), (300, 500), (331, 256)):
        images = maker.draw_image(*size)
        expected = maker.clip_outputs(network, images)
        assert_close(run(net, as_bytes(images), expected["tokens"]), expected)


@pytest.mark.slow
def test_a_torchscript_program_is_read_as_openai_publishes_it(tmp_path, golden):
    torch = import_original()
    network = maker.load_random(maker.clip())
    inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int32)
    torch.jit.trace(network, inputs).save(tmp_path / "clip.pt")
    assert_close(
        run(
            clip.load(tmp_path / "clip.pt", NARROW), as_bytes(maker.draw_image(*maker.IMAGE_SIZE)), golden[1]["tokens"]
        ),
        golden[1],
    )


def test_the_published_network_has_its_parameters():
    assert sum(x.size for x in jax.tree.leaves(clip.abstract_variables())) == 151_277_313
    assert clip.CLIP("abstract", {}).num_features == 512


def test_strict_promotion_is_enough(net):
    variables = clip.abstract_variables(NARROW)
    image, tokens = jax.ShapeDtypeStruct((2, 20, 24, 1), jnp.float32), jax.ShapeDtypeStruct((3, 77), jnp.int32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        features = jax.eval_shape(net.features, variables, image)
        text_features = jax.eval_shape(net.text_features, variables, tokens)
        assert jax.eval_shape(net.logits, variables, features, text_features).shape == (2, 3)
    with pytest.raises(ValueError, match=r"tokens: shape \(3, 76\) does not fit; allowed is \(B, 77\)"):
        net.text_features(net.variables, jnp.zeros((3, 76), jnp.int32))


def test_what_follows_a_text_changes_nothing(net):
    """The tower is causal, and the text ends at the largest id."""
    tokens = np.zeros((2, 77), np.int32)
    tokens[:, :4] = [49406, 320, 2368, 49407]
    tokens[1, 4:9] = 5
    plain, padded = jax.jit(net.text_features)(net.variables, tokens)
    np.testing.assert_allclose(plain, padded, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (40, 56), (500, 331), (224, 300), (449, 225)])
def test_images_are_resized_as_pillow_does_it(size):
    from PIL import Image

    image = as_bytes(maker.draw_image(*size))
    found = np.asarray(preprocess.resize_as_bytes(jnp.asarray(image), 224))[0]
    H, W = (224 * side // min(size) for side in size)
    resized = Image.fromarray(((image[0] + 1) * 127.5).round().astype(np.uint8)).resize(
        (W, H), Image.Resampling.BICUBIC
    )
    top, left = round((H - 224) / 2), round((W - 224) / 2)
    expected = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_allclose((found + 1) * 127.5, expected, atol=1e-4)


@pytest.mark.skipif(not HAS_VOCABULARY, reason="needs the packages of vocabulary and text cleaning")
class TestTokenizer:
    def test_awkward_captions_get_the_ids_of_the_original(self, golden):
        np.testing.assert_array_equal(clip_text.load_tokenizer(use_cut=True)(maker.CAPTIONS), golden[1]["tokens"])

    def test_a_longer_caption_is_refused_or_cut(self):
        longest = "word " * 75
        (ids,) = clip_text.load_tokenizer()([longest])
        assert ids[-1] == 49407 and (ids > 0).all()
        with pytest.raises(
            ValueError,
            match="^prompt: 'word .*more' .379 characters. has 78 tokens of CLIP, at most are 77; shorten it, or",
        ):
            clip_text.load_tokenizer()(["short", longest + "more"])
        np.testing.assert_array_equal(clip_text.load_tokenizer(use_cut=True)([longest + "more"])[0], ids)


def test_packages_that_are_not_there_are_named(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(
        FileNotFoundError, match="^CLIP vocabulary: the package ftfy, which cleans text as CLIP does, is n"
    ):
        clip_text.load_tokenizer()
    monkeypatch.setattr(clip_text, "_import_ftfy", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="^CLIP vocabulary: unset, and the package open-clip-torch==3.3.0 that"):
        clip_text.load_tokenizer()


def test_files_that_are_not_it_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", **{"visual.conv1.weight": np.zeros((768, 3, 16, 16))})
    pattern = (
        r"other.npz': 'visual.class_embedding' is missing, expected is shape \(768,\); give a file of CLIP ViT-B/32"
    )
    with pytest.raises(ValueError, match=pattern):
        clip.load(tmp_path / "other.npz")
    with pytest.raises(
        FileNotFoundError, match="none.pt' is no file; give a file of CLIP ViT-B/32 as OpenAI publishes it"
    ):
        clip.load(tmp_path / "none.pt")


def test_the_weights_say_whether_they_are_the_published_ones(net):
    assert net.weights == "unverified" and re.fullmatch("[0-9a-f]{64}", net.sha256)
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in clip.PUBLISHED)
