"""Sets of images that are measured, read in batches: files in a folder, arrays in a file, what sample.py drew."""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.data.images import image_shape, read_image
from rq_jax.data.listing import list_images
from rq_jax.evaluation.samples import check_settings, read_conditions, subject_of
from rq_jax.evaluation.stamps import digest_of
from rq_jax.interop import state_file
from rq_jax.settings.text import quoted

Batch = dict[str, np.ndarray]
Shape = tuple[int, int, int]
Part = tuple[int, int]  # (index, count) of this process's part of every batch

_EXAMPLES = 64  # images of a batch
ARRAYS = ("arr_0", "images")  # of an .npz, the first as ADM names it
LABELS = ("arr_1", "labels")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one shape, in order.

    Attributes:
      name: as the user gave it.
      shape: (H, W, C).
      num_images: N.
      batches: (batch size, part, number of the first batch) -> batches of one size, as a data set gives them: of each
        this process's part, "image" (B, H, W, C), uint8 or float32 in [-1, 1], "mask" (B,), False for what fills up the
        last batch, "index" (B,) int32.
      is_rounded: they are bytes.
      conditions: (N, U) int, what each was drawn with; None where that is not known, (N, 0) where with nothing.
      prompts: the N texts that they were drawn with.
      subject: where they come from.
      identity: what decides them, as JSON holds it; None where a cache cannot tell them from others.
    """

    name: str
    shape: Shape
    num_images: int
    batches: Callable[..., Iterable[Batch]]
    is_rounded: bool = True
    conditions: np.ndarray | None = None
    prompts: Sequence[str] | None = None
    subject: dict[str, Any] = dataclasses.field(default_factory=dict)
    identity: dict[str, Any] | None = None

    def examples(self, positions: Sequence[int]) -> Batch:
        """The images at these positions; a set that can only be read in order is read from its start."""
        found: dict[int, np.ndarray] = {}
        for batch in self.batches(_EXAMPLES):
            found |= {i: image for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)}
            found = {i: image for i, image in found.items() if i in positions}
            if len(found) == len(set(positions)):
                break
        return {"image": np.stack([found[i] for i in positions])}

    def first(self, count: int, batch_size: int = _EXAMPLES) -> np.ndarray:
        """The first images, at most `count`; a set that is drawn takes the program of batches of this size."""
        images, found = [np.zeros((0, *self.shape), np.uint8 if self.is_rounded else np.float32)], 0
        for batch in self.batches(batch_size):
            images.append(batch["image"][batch["mask"]])
            found += len(images[-1])
            if found >= count:
                break
        return np.concatenate(images)[:count]

    def conditions_digest(self) -> str:
        """What the images were drawn with, whatever their order: "unknown", "none", or a digest."""
        if self.conditions is None:
            return "unknown"
        if self.prompts is None and not self.conditions.shape[1]:
            return "none"
        return digest_of(sorted(self.conditions.tolist() if self.prompts is None else self.prompts))


def of_rows(
    num_images: int, rows: Callable[[int, int], np.ndarray], reads_ahead: bool = True
) -> Callable[..., Iterator[Batch]]:
    """`ImageSet.batches` of images that can be read anywhere.

    Args:
      num_images: N.
      rows: (start, stop) -> images (n, H, W, C).
      reads_ahead: a batch is read while the one before is used.
    """

    def batches(batch_size: int, part: Part = (0, 1), first_batch: int = 0) -> Iterator[Batch]:
        (shard, count), last = part, num_images - 1
        size = batch_size // count

        def read(start: int) -> Batch:
            index = np.arange(start, start + size, dtype=np.int32)
            held = np.minimum(index, last)
            images = rows(int(held[0]), int(held[-1]) + 1)
            return {"image": images[held - held[0]], "mask": index <= last, "index": index}

        starts = range(first_batch * batch_size + shard * size, num_images + shard * size, batch_size)
        if not reads_ahead:
            yield from map(read, starts)
            return
        with ThreadPoolExecutor(1) as pool:
            pending = None
            for start in starts:
                ahead = pool.submit(read, start)
                if pending is not None:
                    yield pending.result()
                pending = ahead
            if pending is not None:
                yield pending.result()

    return batches


def in_memory(images: ImageSet, batch_size: int) -> ImageSet:
    """The same images, kept once they are read, in batches of this size: each is drawn once, or never if not read."""
    unread, read = iter(images.batches(batch_size)), 0
    pixels = np.empty((images.num_images, *images.shape), np.uint8 if images.is_rounded else np.float32)

    def rows(start: int, stop: int) -> np.ndarray:
        nonlocal read
        while read < stop:
            batch = next(unread)
            found = batch["image"][batch["mask"]]
            pixels[read : read + len(found)] = found
            read += len(found)
        return pixels[start:stop]

    return dataclasses.replace(images, batches=of_rows(images.num_images, rows, reads_ahead=False))


def open_images(path: str | os.PathLike) -> ImageSet:
    """Opens a set of images.

    Args:
      path: `--out` of sample.py, a folder of images, or an .npz of images.

    Raises:
      FileNotFoundError: no images are there.
      ValueError: images of several shapes, samples drawn with several settings, or arrays that are no images.
    """
    return _open_arrays(Path(path)) if Path(path).suffix == ".npz" else _open_folder(Path(path))


def _open_folder(directory: Path) -> ImageSet:
    check_settings(directory)
    folder = directory / "images" if (directory / "images").is_dir() else directory
    listing = list_images(folder)
    listing.tell()
    if not listing.paths:
        raise FileNotFoundError(f"--samples: '{directory}' holds no images; give the --out of sample.py")
    paths = [folder / path for path in listing.paths]
    with ThreadPoolExecutor() as pool:
        shapes = sorted(set(pool.map(image_shape, paths)))
    if len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(f"--samples: '{directory}' holds images of several shapes {shapes}; give one size")
    shape = shapes[-1]  # grey ones beside colours count as such
    conditions, prompts = read_conditions(directory, [path.stem for path in paths])

    def rows(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor() as pool:  # the decoders let other threads run
            return np.stack(list(pool.map(lambda path: read_image(path, shape[-1]), paths[start:stop])))

    return ImageSet(
        str(directory), shape, len(paths), of_rows(len(paths), rows), True, conditions, prompts,
        subject=subject_of(directory), identity={"files": _identity(paths), "channels": shape[-1]},
    )  # fmt: skip


def _open_arrays(path: Path) -> ImageSet:
    """An .npz of images: bytes, or floats whose range is seen from their values."""
    state = state_file.read_state(path)
    name = next((name for name in ARRAYS if isinstance(state, dict) and name in state), None)
    if name is None:
        raise ValueError(f"--samples: '{path}' holds no images; give an .npz with {' or '.join(ARRAYS)}")
    array = _mapped(path, name) if _is_stored(path, name) else np.asarray(state[name])
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(f"--samples: '{path}': {name} of shape {array.shape} are no images (N, H, W, 1 or 3)")
    labels = next((np.asarray(state[name]) for name in LABELS if name in state), None)
    if labels is not None and labels.shape != array.shape[:1]:
        raise ValueError(f"--samples: '{path}': labels of shape {labels.shape} for {len(array)} images; give one each")
    is_rounded = array.dtype == np.uint8
    shift, scale = (0.0, 1.0) if is_rounded else _range(path, name, array)

    def rows(start: int, stop: int) -> np.ndarray:
        images = np.asarray(array[start:stop])
        return images if is_rounded else images.astype(np.float32) * np.float32(scale) + np.float32(shift)

    conditions = None if labels is None else labels[:, None]
    batches, identity = of_rows(len(array), rows), {"files": _identity([path]), "array": name}
    return ImageSet(str(path), array.shape[1:], len(array), batches, is_rounded, conditions, identity=identity)


def _identity(paths: Sequence[Path]) -> str:
    """A digest of the names, sizes and times of files."""
    status = [path.stat() for path in paths]
    return digest_of([[path.name, one.st_size, one.st_mtime_ns] for path, one in zip(paths, status, strict=True)])


def _range(path: Path, name: str, array: np.ndarray) -> tuple[float, float]:
    """Shift and factor that take floats to [-1, 1].

    Raises:
      ValueError: they are neither in [-1, 1] nor in [0, 1].
    """
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"--samples: '{path}': {name} of {array.dtype} are no images; give uint8 or floats")
    parts = [array[start : start + 256] for start in range(0, len(array), 256)]
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    if not (-1 <= low and high <= 1):  # NaN too
        fix = "save bytes as uint8" if high > 1 else "scale them"
        found = f"floats in [{low:g}, {high:g}] are neither in [-1, 1] nor in [0, 1]"
        raise ValueError(f"--samples: '{path}': {found}; {fix}")
    return (0.0, 1.0) if low < 0 else (-1.0, 2.0)


def _is_stored(path: Path, name: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{name}.npy").compress_type == zipfile.ZIP_STORED


def _mapped(path: Path, name: str) -> np.ndarray:
    """An array that an .npz holds as it is, whose pages are read when they are asked for; its header was checked."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        file.seek(archive.getinfo(f"{name}.npy").header_offset)
        local = file.read(30)  # of which the last four bytes are the lengths of the name and of extra fields
        file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = header(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def check_shapes(sets: Sequence[ImageSet], shape: Shape | None = None) -> None:
    """All sets have one shape, and that of the models beside them if any.

    Raises:
      ValueError: they have several.
    """
    shapes = {quoted(one.name): one.shape for one in sets}
    if len({*shapes.values(), *([] if shape is None else [shape])}) > 1:
        listed = ", ".join(f"{name} {one}" for name, one in shapes.items())
        raise ValueError(f"--samples: images of several shapes: {listed}; compare one shape")
