"""Prepared TFDS datasets, stored as ArrayRecord or as TFRecord, without TensorFlow."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rq_jax.data.images import is_regular
from rq_jax.data.sources.records import check_key
from rq_jax.data.tfrecord import Part, TfRecords
from rq_jax.files import local_path, parse_json, read_json
from rq_jax.settings.text import quoted

_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of this version of features.json, and of earlier ones
_NESTED_KEYS = ("json", "content")  # JSON inside of a string of JSON
_DEPTHS = ("*", "*/*", "*/*/*")  # a version below a dataset, below its config


class _MetadataError(ValueError):
    """Files of a prepared dataset that TFDS is not to read."""


class TfdsRecords:
    """One split of a prepared TFDS dataset, stored as ArrayRecord or as TFRecord."""

    def __init__(self, builder, split: str, label_key: str | None, text_key: str | None):
        import tensorflow_datasets as tfds

        self.name, self.split = builder.info.full_name, split
        self.incomplete: Mapping[int, str] = {}
        features = builder.info.features
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        self.label_keys = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
        self.text_keys = list(_texts(features))
        self.split_counts = {name: one.num_examples for name, one in builder.info.splits.items()}
        if not images:
            raise ValueError(
                f"data.name: dataset '{self.name}' has no Image feature; its features are {', '.join(features)}"
            )
        self.image_key = "image" if "image" in images else images[0]
        self.label_key = check_key("label_key", label_key, self.label_keys, self.name)
        self.text_key = check_key("text_key", text_key, self.text_keys, self.name)
        self.class_names = tuple(features[label_key].names) if label_key else None
        try:
            builder.info.splits[split]
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"split: '{split}' is unknown in dataset '{self.name}'; allowed are {splits}") from error
        self._data = self._open(builder)

    def _open(self, builder) -> Any:
        import tensorflow_datasets as tfds

        files = builder.info.splits[self.split].file_instructions
        self.root, self.files = Path(builder.data_dir), [os.path.basename(file.filename) for file in files]
        for path in {os.fspath(file.filename) for file in files}:
            if os.path.exists(path) and not is_regular(path):
                raise ValueError(f"data.name: '{path}' is no regular file")
        if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
            return TfRecords([Part(os.fspath(f.filename), f.skip, f.take) for f in files])
        # TFDS hands out encoded images: a decoding error inside it would end the run.
        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        try:
            return builder.as_data_source(self.split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"data.name: dataset '{self.name}' is stored as neither array_record nor tfrecord, so it has no random "
                "access; prepare it with download_and_prepare(file_format='array_record')"
            ) from error
        except Exception as error:  # of files that do not fit the description of the dataset
            raise ValueError(f"data.name: dataset '{self.name}' cannot be opened: {quoted(error, 300)}") from error

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        try:
            record = self._data[index]
        except (RuntimeError, IndexError) as error:  # array_record's, for missing or damaged files
            raise ValueError(f"cannot read: {error}") from error
        try:
            label = int(record[self.label_key]) if self.label_key else None
            return record[self.image_key], label, _first_text(record, self.text_key) if self.text_key else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the record does not match the features of the dataset: {error!r}") from error

    def locate(self, index: int) -> str:
        return f"example {index} of {self.name}, split {self.split}"


def open_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """The TFDS builder of a prepared dataset.

    Raises:
      FileNotFoundError: no such dataset, or it is not prepared.
      ValueError: its files cannot be read, or name code of others.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import file_utils

    where = "the default TFDS directory" if data_dir is None else f"data_dir={str(data_dir)!r}"
    data_dir = None if data_dir is None else local_path(data_dir)
    try:
        base = tfds.core.naming.parse_builder_name_kwargs(name)[0].name  # the folder, also of a name as MyFaces
        for directory in file_utils.list_data_dirs(data_dir):
            check_metadata(Path(directory) / base, _DEPTHS)
        builder = tfds.builder(name, data_dir=data_dir)
    except (
        tfds.core.DatasetNotFoundError,
        ValueError,
        AssertionError,
    ) as error:  # no such name, config or version
        if isinstance(error, _MetadataError):
            raise
        raise FileNotFoundError(
            f"data.name: '{name}' is unknown; allowed are twemoji, avatars, folder, parquet, webdataset and the "
            f"datasets prepared in {where}"
        ) from error
    except Exception as error:  # of a file that is JSON, but of another shape
        raise ValueError(f"data.name: '{name}' in {where} cannot be read: {quoted(error, 300)}") from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data.name: '{name}' is not prepared in {where}; call its builder's "
            "download_and_prepare(file_format='array_record') first"
        )
    return builder


def check_metadata(directory: Path, depths: tuple[str, ...] = ("",)) -> None:
    """Check the JSON files of prepared datasets before TFDS reads them: it imports what their features name.

    Args:
      directory: of the dataset.
      depths: patterns of the folders below it that hold such files.

    Raises:
      ValueError: a file is no JSON, or names a class that is not one of TFDS's own features.
    """
    checks = {"dataset_info.json": read_json, "features.json": _check_features}
    for name, check in checks.items():
        for file in (file for depth in depths for file in directory.glob(f"{depth}/{name}".removeprefix("/"))):
            try:
                if not is_regular(file):
                    raise ValueError(f"'{file}' is no regular file")
                check(file)
            except ValueError as error:
                raise _MetadataError(f"data.name: {error}") from None


def _check_features(file: Path) -> None:
    import tensorflow_datasets as tfds

    base = tfds.features.FeatureConnector
    classes = [each for each in vars(tfds.features).values() if isinstance(each, type) and issubclass(each, base)]
    own = {name for each in classes for name in (f"{each.__module__}.{each.__name__}", *vars(each).get("ALIASES", ()))}
    for found in _class_names(read_json(file), str(file)):
        if found not in own:
            raise ValueError(
                f"'{file}' names the feature class {quoted(found)}, which is not one of TFDS's own and is not "
                "imported; prepare the dataset with features of tfds.features"
            )


def _class_names(document: Any, file: str) -> Iterator[str]:
    """Names of classes in a features.json, also in JSON that is written as a string."""
    pending = [document]
    while pending:
        value = pending.pop()
        members = value.items() if isinstance(value, dict) else ((None, each) for each in value)
        for key, member in members:
            if isinstance(member, dict | list):
                pending.append(member)
            elif isinstance(member, str) and key in _CLASS_KEYS and (key != "type" or "." in member):
                yield member
            elif isinstance(member, str) and key in _NESTED_KEYS and member.lstrip()[:1] in ("{", "["):
                pending.append(parse_json(member, f"'{file}', {key}", dict if "{" in member.lstrip()[:1] else list))


def _texts(features: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the Text features of a TFDS dataset, "captions/text" for one inside another feature."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.Text):
        yield "/".join(path)
    elif isinstance(features, tfds.features.Sequence):
        yield from _texts(features.feature, path)
    elif isinstance(features, tfds.features.FeaturesDict):
        for name in features:
            yield from _texts(features[name], (*path, name))


def _first_text(record: Mapping[str, Any], key: str) -> str:
    """The text of a record, or the first of several."""
    name = key
    while name not in record:
        outer, _, name = name.partition("/")
        record = record[outer]
    texts = record[name]
    if not isinstance(texts, bytes):
        if len(texts) == 0:
            raise ValueError(f"no text in {key!r}")
        texts = texts[0]
    return texts.decode()
