"""Data: TFDS builders and sources, image transforms, captions, grain pipelines, and a cache of computed features."""

from rq_jax.data.cache import CacheDataset, read_meta, write_cache
from rq_jax.data.pipeline import Dataset, make_dataset

__all__ = ["CacheDataset", "Dataset", "make_dataset", "read_meta", "write_cache"]
