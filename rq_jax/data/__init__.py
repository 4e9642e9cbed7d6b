"""Image datasets: sources, transforms, captions, batches with exact resume, and a cache of computed features."""

import importlib

_HOMES = {
    "CacheDataset": "cache",
    "Dataset": "pipeline",
    "Splits": "splits",
    "bind_data": "fingerprint",
    "from_arrays": "arrays",
    "load_thresholds": "entropy",
    "load_tokenizer": "text",
    "make_dataset": "splits",
    "measure_thresholds": "entropy",
    "open_splits": "splits",
    "read_meta": "cache",
    "write_cache": "cache",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name on first use, so that `python -m rq_jax.data.text` imports that module alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
