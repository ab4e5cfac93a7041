"""Where worker processes come from: one process that imports what they need once, and is copied for each.

It never has threads of its own work, so that its copies are safe, unlike copies of a process that encodes.
"""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

# One that is not installed is left out.
_PRELOADED = ["data_prep.workers", "tokenizers", "gigatoken", "pyarrow.parquet"]


def worker_context() -> BaseContext:
    """How worker processes are started; where there is no fork each imports everything itself."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_server() -> None:
    """Let it import while this process does its own imports."""
    if worker_context().get_start_method() == "forkserver":
        forkserver.ensure_running()
