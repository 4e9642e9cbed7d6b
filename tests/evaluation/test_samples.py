"""Codes of samples read back; by way of the script in test_sample.py, their images in test_image_sets.py."""

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from rq_jax.evaluation import conditions, samples


def codes(**arrays):
    return {"codes": np.zeros((3, 2, 2, 1), np.int32), **arrays}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            codes(image_ids=np.zeros(0, np.int64)),
            r"image_ids \(0,\) int64 is not \(n\) integers for n = 3 images; give",
        ),
        (codes(image_ids=np.array("a")), r"image_ids \(\) <U1 is not \(n\) integers"),
        (codes(image_ids=np.arange(3.0)), r"image_ids \(3,\) float64 is not \(n\) integers"),
        (codes(cond=np.zeros((2, 1), int)), r"cond \(2, 1\) int64 is not \(n, \.\.\.\) integers for n = 3"),
        (codes(codes=np.zeros((3, 2, 2, 1))), r"codes \(3, 2, 2, 1\) float64 is not \(n, \.\.\.\) integers"),
        (codes(codes=np.zeros((0, 2, 2, 1), int)), r"codes of shape \(0, 2, 2, 1\) are not \(n, h, w, D\)"),
        (codes(grains=np.zeros((3, 2), int)), r"grains \(3, 2\) int64 is not \(n, \.\.\.\) integers"),
        (codes(codes=np.array([None])), "cannot be read"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "codes.npz", **arrays)
    with pytest.raises(ValueError, match=f"^--prefix: .*{message}"):
        samples.read_draws(tmp_path / "codes.npz")


def test_codes_start_with_the_first_image(tmp_path):
    first = np.arange(3, dtype=np.int32)[:, None, None, None]
    np.savez(tmp_path / "codes.npz", codes=first, image_ids=np.arange(3) + 4, cond=first[:, 0, 0])
    draws = samples.read_draws(tmp_path / "codes.npz")
    assert draws.codes[4 % 3].item() == draws.conds[4 % 3].item() == 0


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_codes_that_inflate_are_refused_before(tmp_path):
    with zipfile.ZipFile(tmp_path / "codes.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", npy(np.zeros((10**5, 2, 2, 1), np.int32)))
    with pytest.raises(ValueError, match="^--prefix: .* inflates to more than 100 times its size; give the codes"):
        samples.read_draws(tmp_path / "codes.npz")


def test_encrypted_and_damaged_codes_are_refused(tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, **codes())
    whole = path.read_bytes()
    flagged = bytearray(whole)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        flagged[whole.index(signature) + offset] |= 1  # encrypted, says the header
    longer = whole.replace(b"(3, 2, 2, 1)", b"(3, 2, 2, 9)")
    for content in (bytes(flagged), longer):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^--prefix: .* cannot be read"):
            samples.read_draws(path)


@pytest.mark.parametrize("config", [{"class_names": ["a"]}, {"class_counts": [1, 2, 3, 4]}, {"class_names": ["a"] * 4}])
def test_classes_of_another_number_than_the_models_are_refused(config):
    (entry,) = config
    model = SimpleNamespace(is_conditional=True, cond_length=1, cond_vocab_size=3)
    with pytest.raises(
        ValueError, match=f"^'run/config.json': {len(config[entry])} {entry} for a model of 3 classes; "
    ):
        conditions.choose_conditions(SimpleNamespace(model=model, config=config), "run", 5)
