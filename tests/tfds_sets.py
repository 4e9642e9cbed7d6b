"""Small prepared data sets."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def encode(pixels, kind="png"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def grey_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 9, 7), dtype=np.uint8)


def write_tfds(name, features, splits, data_dir):
    """Prepare a data set that exists as files only, as if somebody else had made it."""

    class ForeignSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            return enumerate(rows)

    ForeignSet.name = name
    ForeignSet(data_dir=data_dir).download_and_prepare(file_format="array_record")
