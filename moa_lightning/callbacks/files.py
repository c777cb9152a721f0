"""The files of a run that a resumed fit must continue without a seam: metrics.csv and TensorBoard's event files.

Both are cut back to the checkpoint. TensorBoard's own means, `purge_step`, hides all events whose step is at or past
one number, whatever their tag: a run resumed at step 100 would lose every point of `..._vs_tokens` past token 100, and
keep orphans of `..._vs_seconds` below second 100. So the event files themselves are cut where the lost part begins.
"""

import csv
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event

COUNTERS = ("step", "samples", "tokens", "flops", "seconds")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at once: a reader sees the old text or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


class MetricsTable:
    """metrics.csv: one row a logging point; the counters, then a column a metric, empty where it was not measured.

    Args:
        path: the file; rows found there are kept up to and including optimiser step `last_step`.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self._columns: list[str] = list(COUNTERS)
        rows: list[dict[str, str]] = []
        if path.exists() and last_step > 0:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _is_whole(row) and int(row["step"]) <= last_step]
                self._columns = list(reader.fieldnames or COUNTERS)
        self._rewrite(rows)

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row; a metric not seen before becomes a new column, for which the file is rewritten."""
        new = [name for name in row if name not in self._columns]
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def _is_whole(row: dict[str, str]) -> bool:
    """Whether a row was written to its end; a killed run may leave half of its last one, which lacks cells."""
    return all(cell is not None for cell in row.values())


def cut_event_files(folder: Path, step: int, samples: int) -> None:
    """Cut each event file in the folder (not below it) at its first event past a checkpoint.

    Args:
        folder: a run's folder; no writer may have a file in it open that holds such an event.
        step: optimiser steps done at the checkpoint; the events kept have TensorBoard steps below it.
        samples: samples seen at the checkpoint; the same for tags on the sample axis. Tags on the axes of tokens and
            seconds are written after their sample tag, so they go with it.
    """
    for path in folder.glob("events.out.tfevents.*"):
        for offset, event in _events(path):
            if _is_past(event, step, samples):
                os.truncate(path, offset)
                break


def _events(path: Path) -> Iterator[tuple[int, Event]]:
    """Events with their byte offsets; a record is its length (8 bytes), a checksum (4), the event, a checksum (4)."""
    with path.open("rb") as file:
        offset = 0
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            data = file.read(length + 4)
            if len(data) < length + 4:  # the run was killed while it wrote
                return
            yield offset, Event.FromString(data[:length])
            offset += 12 + length + 4


def _is_past(event: Event, step: int, samples: int) -> bool:
    for value in event.summary.value:
        if value.tag.endswith("_vs_samples"):
            return event.step > samples
        if value.tag.endswith(("_vs_tokens", "_vs_megaflops", "_vs_seconds")):
            return False
        return event.step >= step
    return False
