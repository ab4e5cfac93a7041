"""Where prepared datasets and runs lie: under the working folder, or where DATA_DIR and RUNS_DIR say."""

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder of all prepared datasets: $DATA_DIR, else `data`."""
    return Path(os.environ.get("DATA_DIR") or "data")


def runs_dir() -> Path:
    """The folder of all runs: $RUNS_DIR, else `runs`."""
    return Path(os.environ.get("RUNS_DIR") or "runs")


def dataset_folder(name_or_path: str | Path) -> Path:
    """The folder of a prepared dataset: a bare name lies under `data_dir()`, anything with a separator is a path."""
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or os.sep in text or "/" in text or text in (".", "..")
    return Path(text) if is_path else data_dir() / text
