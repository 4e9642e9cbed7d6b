"""Tables as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns under their headings, aligned to the right; a row without a column leaves it empty.

    Args:
      rows: heading -> cell; floats are shown with four significant digits, all else as text.

    Returns:
      A line of headings and one for each row, without a line break at the end.
    """
    headings = list(dict.fromkeys(name for row in rows for name in row))
    return aligned([headings, *([_shown(row.get(name, "")) for name in headings] for row in rows)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _shown(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
