"""runs/<name>/events.jsonl: what happened to a run besides training: rollbacks, changes, forks, extensions.

One JSON object per line, each with `event` and `at`; a line is on the disk when `append_event` returns. The file is
never cut back: a rollback must outlive a kill in its middle. The excluded samples are read from here.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def append_event(run: Path, record: dict[str, Any]) -> None:
    """Append one record durably.

    Args:
        run: the run's folder.
        record: has `event`, its kind. A rollback has `step` and `last_step` (first and last bad step), `to_step` (the
            step training goes back to), `excluded` ([[first sample, end sample], ...]) and `reason`.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = run / EVENTS
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps({**record, "at": now}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events, oldest first; a line that a power cut tore is left out."""
    path = run / EVENTS
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record:
            events.append(record)
    return events


def excluded_ranges(run: Path) -> tuple[tuple[int, int], ...]:
    """The samples that rollbacks took out of a run, as sorted (first, end) ranges."""
    ranges = {
        (int(first), int(end))
        for event in read_events(run)
        if event["event"] == "rollback"
        for first, end in event["excluded"]
    }
    return tuple(sorted(ranges))
