"""TFRecord: data sets in the format of most prepared ImageNets, written by somebody else's code, read in any order."""

import gzip
import json
import os
import pickle
import struct
import sys

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
from array_record.python.array_record_module import ArrayRecordReader  # noqa: E402
from tensorboardX.record_writer import RecordWriter  # noqa: E402
from tensorflow_datasets.proto.tf_example_generated_pb2 import Example  # noqa: E402
from tfds_sets import encode, grey_images, write_tfds  # noqa: E402

from rq_jax.data import make_dataset, tfrecord  # noqa: E402
from rq_jax.data.sources import ImageSource, open_records  # noqa: E402

SHARDS = {"train": (5, 0, 7), "test": (3,)}  # records of each file; one of them is empty


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A data set as ArrayRecord, and its very records as TFRecord in several files, written by tensorboardX."""
    array, record = (tmp_path_factory.mktemp(name) for name in ("array", "record"))
    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
        "said": tfds.features.Text(),
    }
    pictures = [encode(pixels) for pixels in grey_images(15)]
    rows = [{"image": picture, "kind": i % 3, "said": f"row {i}"} for i, picture in enumerate(pictures)]
    write_tfds("pets", features, {"train": rows[:12], "test": rows[12:]}, array)
    source, target = array / "pets" / "1.2.3", record / "pets" / "1.2.3"
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    for split in info["splits"]:
        split["shardLengths"] = [str(count) for count in SHARDS[split["name"]]]
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        (path,) = source.glob(f"pets-{split['name']}.array_record*")
        reader = ArrayRecordReader(str(path))
        records = iter(reader.read_all())
        for i, count in enumerate(SHARDS[split["name"]]):
            file = target / f"pets-{split['name']}.tfrecord-{i:05d}-of-{len(SHARDS[split['name']]):05d}"
            writer = RecordWriter(str(file))
            for _ in range(count):
                writer.write(next(records))
            writer.close()
    for path in [*source.glob("*.txt"), source / "features.json"]:
        (target / path.name).write_bytes(path.read_bytes())
    (target / "dataset_info.json").write_text(json.dumps(info))
    return array, record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RQ_JAX_DATA", str(tmp_path / "cache"))
    tfrecord.record_offsets.cache_clear()


def opened(directory, split="train"):
    return open_records("pets", split, directory, label_key="kind", text_key="said")


@pytest.mark.parametrize(
    "split, count", [("train", 12), ("test", 3), ("train[4:9]", 5), ("train[50%:]", 6), ("test+train", 15)]
)
def test_records_are_those_of_the_other_format(directories, split, count):
    array, record = (opened(directory, split) for directory in directories)
    assert len(record) == len(array) == count and record.class_names == ("a", "b", "c")
    for i in np.random.default_rng(0).permutation(count):
        assert record.read(int(i)) == array.read(int(i))
    assert "tensorflow" not in sys.modules


def test_images_come_in_the_order_of_the_other_format_and_resume(directories):
    """Files shuffled as a whole: the order is that of every other data set, and a position can be gone on from."""

    def dataset(directory):
        return make_dataset(split="train", train=True, name="pets", data_dir=directory, batch_size=4, image_size=5, channels=1, label_key="kind")  # fmt: skip

    array, record = (dataset(directory).iterator() for directory in directories)
    states, batches = [], []
    for _ in range(7):
        states.append(record.get_state())
        batches.append(next(record))
        expected = next(array)
        assert batches[-1].keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(batches[-1][name], values)
    assert len(np.unique(np.concatenate([batch["index"] for batch in batches[:3]]))) == 12
    again = dataset(directories[1]).iterator()
    again.set_state(states[4])
    np.testing.assert_array_equal(next(again)["image"], batches[4]["image"])
    for iterator in (array, record, again):  # whose threads would read on into the next test
        iterator.close()


def test_records_travel_to_worker_processes(directories):
    record = opened(directories[1])
    expected = record.read(3)
    copy = pickle.loads(pickle.dumps(record))
    assert copy.read(3) == expected


def test_offsets_are_scanned_once(directories, tmp_path, monkeypatch):
    expected = opened(directories[1]).read(2)
    assert any((tmp_path / "cache" / "tfrecord_places").iterdir())
    tfrecord.record_offsets.cache_clear()
    monkeypatch.setattr(tfrecord, "_scan", lambda *_: pytest.fail("scanned again"))
    assert opened(directories[1]).read(2) == expected


# --- damage -----------------------------------------------------------------------------------------------------------


def write_records(path, records):
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


@pytest.mark.parametrize("length", [0, 1, 8, 4096 + 77])
def test_checksums_are_those_of_the_writer(tmp_path, length):
    data = np.random.default_rng(length).bytes(length)
    with open(write_records(tmp_path / "a", [data]), "rb") as file:
        assert struct.pack("<I", tfrecord.masked_crc32c(data)) == file.read()[-4:]


@pytest.mark.fault("a bit flipped in a TFRecord", "passed over and counted")
def test_a_flipped_bit_is_seen(directories, tmp_path):
    record = opened(directories[1])
    parts, places = record._data._parts, tfrecord.record_offsets(record._data._parts[0].path)
    broken = tmp_path / "broken"
    content = bytearray(open(parts[0].path, "rb").read())
    start, length = (int(value) for value in places[2])
    content[start + length - 1] ^= 1
    broken.write_bytes(content)
    record._data._parts[0] = parts[0]._replace(path=str(broken))
    with pytest.raises(ValueError, match=r"^record 2 of '.*broken' does not match its checksum$"):
        record.read(2)
    assert ImageSource(record)[2]["index"] == 3


def test_files_are_not_kept_open(directories):
    record = opened(directories[1])
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(record)):
        record.read(i)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_compressed_files_are_named(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(open(write_records(tmp_path / "b", [b"one"]), "rb").read()))
    with pytest.raises(ValueError, match="^'.*a' is compressed, so that its records have no offsets; unpack it$"):
        tfrecord.record_offsets(str(path))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_damaged_offsets_are_scanned_again(tmp_path, content):
    path = write_records(tmp_path / "a", [b"one", b"three"])
    expected = tfrecord.record_offsets(path)
    (cached,) = (tmp_path / "cache" / "tfrecord_places").iterdir()
    cached.write_bytes(cached.read_bytes()[:-9] if content is None else content)
    tfrecord.record_offsets.cache_clear()
    np.testing.assert_array_equal(tfrecord.record_offsets(path), expected)
    assert np.load(cached).tolist() == expected.tolist()


@pytest.mark.parametrize("damage", ["length", "torn", "empty"])
def test_records_after_damage_are_missing(tmp_path, damage):
    path = write_records(tmp_path / "a", [b"one", b"three", b"five"])
    size = os.stat(path).st_size
    with open(path, "r+b") as file:
        if damage == "length":  # of the second record
            file.seek(16 + 3)
            file.write(struct.pack("<Q", 4))
        else:
            file.truncate(size - 1 if damage == "torn" else 0)
    whole = {"length": 1, "torn": 2, "empty": 0}[damage]
    assert len(tfrecord.record_offsets(path)) == whole
    records = tfrecord.TfRecords([tfrecord.Part(path, 0, 3)])
    assert len(records) == 3
    with pytest.raises(ValueError, match=rf"holds {whole} whole records, but number 2 is asked for"):
        records[2]


def test_what_is_no_example_is_a_damaged_image(tmp_path):
    path = write_records(tmp_path / "a", [b"\xff\xff", b""])
    records = tfrecord.TfRecords([tfrecord.Part(path, 0, 2)])
    with pytest.raises(ValueError, match="^no Example: "):
        records[0]
    assert records[1] == {}


def test_damaged_examples_are_skipped_and_counted(directories, tmp_path):
    record = opened(directories[1])
    (i,) = [i for i in range(12) if record.read(i)[2] == "row 6"]
    parts = record._data._parts
    places = tfrecord.record_offsets(parts[1].path)
    broken = tmp_path / "broken"
    broken.write_bytes(open(parts[1].path, "rb").read())
    with open(broken, "r+b") as file:
        file.seek(int(places[i - 5][0]))
        file.write(b"\xff" * 9)
    record._data._parts[1] = parts[1]._replace(path=str(broken))
    source = ImageSource(record, channels=1)
    assert source[i]["index"] == i + 1 and source.damaged == {i}


def test_values_of_every_kind():
    kinds = Example()
    kinds.features.feature["one"].int64_list.value.append(-3)
    kinds.features.feature["many"].float_list.value.extend([0.5, 2.0])
    kinds.features.feature["bytes"].bytes_list.value.append(b"x\x00")
    kinds.features.feature["nothing"].SetInParent()
    found = tfrecord.parse_example(kinds.SerializeToString())
    assert found == {"one": -3, "many": [0.5, 2.0], "bytes": b"x\x00", "nothing": []}
