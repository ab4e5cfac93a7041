"""The progress of a tokenizer's training, which the `tokenizers` library writes to file descriptor 2 as JSON lines.

In: what native code writes there while the block runs. Out: `Progress` of its stages; everything else goes on to the
real stderr as it is. What Python writes to sys.stderr goes there directly.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from data_prep.progress import Progress

_STAGES = {"Tokenize words": "counting words", "Count pairs": "counting pairs", "Compute merges": "learning merges"}


@contextmanager
def shown_merges() -> Iterator[None]:
    """Show the stages of a training with `progress_format="json"`."""
    sys.stderr.flush()
    real = os.dup(2)
    read_end, write_end = os.pipe()
    python_stderr = sys.stderr
    if _writes_to_2(python_stderr):
        sys.stderr = os.fdopen(os.dup(real), "w", buffering=1, errors="backslashreplace")
    os.dup2(write_end, 2)
    os.close(write_end)
    reader = threading.Thread(target=_read, args=(read_end, real), daemon=True)
    reader.start()
    try:
        yield
    finally:
        os.dup2(real, 2)  # the last end for writing is closed by it: the reader comes to the end
        reader.join()
        if sys.stderr is not python_stderr:
            sys.stderr.close()
            sys.stderr = python_stderr
        os.close(real)


def _writes_to_2(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, ValueError):  # a stream in memory has no file
        return False


def _read(read_end: int, real: int) -> None:
    progress, known = None, None
    with open(read_end, "rb") as lines:
        for line in lines:
            event = None
            with suppress(ValueError):
                event = json.loads(line)
            if not isinstance(event, dict) or event.get("stage") not in _STAGES:
                os.write(real, line)
                continue
            if event["stage"] != known:
                _end(progress)
                known = event["stage"]
                progress = Progress(_STAGES[known], event["total"], "merges" if known == "Compute merges" else "words")
            progress.add_input(event["current"] - progress.num_done)
    _end(progress)


def _end(progress: Progress | None) -> None:
    if progress is not None:
        progress.finish()  # the library's total counts the alphabet, too, which takes no merge
        progress.close()
