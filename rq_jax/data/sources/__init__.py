"""Sources of images with random access, a module a kind, without TensorFlow."""

import os

from rq_jax.data.bundled import is_bundled, prepare
from rq_jax.data.sources.examples import ImageSource
from rq_jax.data.sources.folder import FolderRecords
from rq_jax.data.sources.parquet import ParquetRecords
from rq_jax.data.sources.records import Records
from rq_jax.data.sources.tar import TarRecords
from rq_jax.data.sources.tfds import TfdsRecords, check_metadata, open_builder

_KINDS = {"folder": FolderRecords, "parquet": ParquetRecords, "webdataset": TarRecords}
__all__ = ["FolderRecords", "ImageSource", "Records", "TfdsRecords", "open_records"]


def open_records(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    label_key: str | None = None,
    text_key: str | None = None,
) -> Records:
    """Open one split of a dataset.

    Args:
      name: "twemoji", "twemoji/256", "avatars" or "avatars/128" (made on first use), "folder", "parquet" or
        "webdataset", or the name of a prepared TFDS dataset.
      split: a split of it, or a TFDS slice such as "train[:50%]"; of a folder also a .txt file of names.
      data_dir: the folder of images or files, or the directory of TFDS datasets; None is the default of the latter.
      label_key: a ClassLabel feature or column, "folder", or "cls" of a webdataset; None for no labels.
      text_key: a Text feature or column, or "txt"; None for no captions. Of several texts, as "captions/text" of
        COCO, the first.

    Returns:
      The records.

    Raises:
      FileNotFoundError: no such folder or prepared dataset, or nothing in it.
      ValueError: an unknown split or key, or files that cannot be read.
    """
    if name in _KINDS:
        return _KINDS[name](data_dir, split, label_key, text_key)
    if is_bundled(name):
        import tensorflow_datasets as tfds

        directory = prepare(data_dir, name)
        check_metadata(directory)
        builder = tfds.builder_from_directory(directory)
    else:
        builder = open_builder(name, data_dir)
    return TfdsRecords(builder, split, label_key, text_key)
