"""Stage 2: the cache of latents against encoding on the fly, and when it is made again."""

import functools
import os

import helpers
import jax
import numpy as np
import pytest
from toy_stage2 import prepare

from rq_jax.recipes import codes as frozen_codes
from rq_jax.recipes import latent_cache


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


def open_cache(places, directory, **settings):
    recipe, data, _ = prepare(places, loop__use_latent_cache=True, **settings)
    arguments = recipe.tokenizer_variables, data.ordered, recipe.config["data"], directory, recipe.seed
    return recipe, data, latent_cache.open_cache(recipe.tokenizer.model, *arguments)


def make_encoder(recipe):
    encode = jax.jit(functools.partial(frozen_codes.encode, recipe.tokenizer.model))
    return functools.partial(encode, recipe.tokenizer_variables)


def test_cache_holds_what_encoding_on_the_fly_gives(places, tmp_path):
    recipe, data, cached = open_cache(places, tmp_path)
    encode = make_encoder(recipe)
    on_the_fly, from_cache = data.train.iterator(), cached.iterator()
    for _ in range(5):  # two epochs of 20 pictures
        batch, stored = next(on_the_fly), next(from_cache)
        assert stored.keys() == {"latents", "cond", "index"}
        for name in ("cond", "index"):
            np.testing.assert_array_equal(stored[name], batch[name])
        np.testing.assert_allclose(stored["latents"], encode(batch["image"]), atol=1e-5)


def test_cache_holds_both_views_where_pictures_are_mirrored(places, tmp_path):
    recipe, data, cached = open_cache(places, tmp_path, data__flip_probability=0.5)
    encode = make_encoder(recipe)
    iterator, mirrored = cached.iterator(), []
    for _ in range(3):
        batch = next(iterator)
        images = data.train.examples(batch["index"])["image"]
        views = [np.asarray(encode(x)) for x in (images, images[:, :, ::-1])]
        errors = np.stack([np.abs(view - batch["latents"]).max((1, 2, 3)) for view in views])
        np.testing.assert_allclose(errors.min(0), 0, atol=1e-5)
        mirrored += list(errors.argmin(0))
    assert 0 < sum(mirrored) < len(mirrored)


def test_cache_is_made_once_for_the_same_pictures_and_tokenizer(places, tmp_path, monkeypatch, caplog):
    open_cache(places, tmp_path)

    def fail(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(latent_cache, "encode", fail)
    open_cache(places, tmp_path)
    with pytest.raises(AssertionError, match="encoded again"):
        open_cache(places, tmp_path, data__flip_probability=0.5)
    with pytest.raises(AssertionError, match="encoded again"):
        open_cache(places, tmp_path, data__eval_transform="squash", data__train_transform="squash")
    os.utime(next(places.pictures.rglob("train/**/*.png")), (1, 1))  # as of another picture under the same name
    with pytest.raises(AssertionError, match="encoded again"):
        open_cache(places, tmp_path)
    assert caplog.messages[-1] == f"'{tmp_path / 'latents'}': the latents are computed again: file times differ"
