"""What a command of evaluate.py found: its record, the figures in it with their protocols, images."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from rq_jax.evaluation.stamps import Fields, Figure
from rq_jax.report import grids


@dataclasses.dataclass
class Report:
    """What a command found.

    Attributes:
      record: as JSON holds it.
      figures: of the record, with their protocols.
      subjects: what was measured -> where it comes from.
      told: lines for the terminal, below the table.
    """

    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    subjects: dict[str, Fields] = dataclasses.field(default_factory=dict)
    told: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, of: str, value: Any, settings: Fields, protocol: Fields) -> None:
        """Adds a figure of a set, which stands in the record under its name, with settings, and under the set."""
        entry = self.record.setdefault(name, {**settings, "of": {}})
        entry["of"][of] = value
        self.figures.append(Figure(name, of, (name, "of", of), protocol))

    def picture(self, path: Path, image: Any, what: str) -> None:
        """Writes an image, once for all processes, and tells of it."""
        if jax.process_index() == 0:
            grids.save_png(path, image)
        self.told.append(f"{what}: {path}")
