"""Where prepared datasets and runs lie: under the working folder, or where DATA_DIR and RUNS_DIR say."""

import os
import re
from pathlib import Path

from data_prep.catalog import split_bucket


def data_dir() -> Path:
    """The folder of all prepared datasets: $DATA_DIR, else `data`."""
    return Path(os.environ.get("DATA_DIR") or "data")


def runs_dir() -> Path:
    """The folder of all runs: $RUNS_DIR, else `runs`."""
    return Path(os.environ.get("RUNS_DIR") or "runs")


def cache_dir() -> Path:
    """What is only there to save time: $CLM_CACHE_DIR, else the user's cache folder. It may be deleted."""
    own = os.environ.get("CLM_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clm-recipes"


def as_argument(folder: Path) -> str:
    """A folder as `dataset_folder` finds it again, for commands in messages: `d` becomes `./d`."""
    text = str(folder)
    return text if os.sep in text or text in (".", "..") else f".{os.sep}{text}"


def check_command(folder: Path) -> str:
    """What recounts a dataset, for messages."""
    return f"`make check DATASET={as_argument(folder)}`"


def dataset_folder(name_or_path: str | Path) -> Path:
    """The folder of a prepared dataset: a bare name lies under `data_dir()`, anything with a separator is a path.

    `name/bucket`, where no such path exists, lies under `data_dir()` too if it is listed or prepared there.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text in (".", ".."):
        return Path(text)
    if os.sep not in text and "/" not in text:
        return data_dir() / text
    if re.fullmatch(r"[^/.][^/]*/[^/]+", text) and not Path(text).exists():
        folder = data_dir() / text
        if split_bucket(text)[1] is not None or folder.is_dir():
            return folder
    return Path(text)
