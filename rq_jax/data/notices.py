"""Lines about data, each told once in a process, however often it is opened."""

import functools
import logging


@functools.lru_cache(maxsize=4096)
def tell(line: str) -> None:
    """Log a line as a warning, unless it was told before."""
    logging.getLogger(__name__).warning(line)
