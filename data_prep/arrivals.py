"""How far the downloads of a preparation are: one `Progress`, "downloading", for all files that come at the same time.

In: how many bytes of each file are here, from the threads that download. Out: a bar or lines. Nothing is shown before
the first byte comes; of a file that an earlier attempt began, what was here counts as done and not as speed.
"""

import threading
from collections.abc import Callable
from typing import Any

from data_prep.progress import Progress

Note = Callable[[int], None]  # so many bytes of a file are here


class Arrivals:
    """The bytes that came.

    Args:
        count_all: All bytes that will come; None where a cap decides that later. Called when the first ones come.
    """

    def __init__(self, count_all: Callable[[], int | None]):
        self._count_all = count_all
        self._progress: Progress | None = None
        self._is_closed = False
        self._num_here: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, path: str) -> Note:
        """What to call when there is more of a file; the first call tells what was here before."""
        return lambda num_bytes: self._note(path, num_bytes)

    def close(self) -> None:
        """End the bar."""
        with self._lock:
            self._is_closed = True
            if self._progress is not None:
                self._progress.close()

    def _note(self, path: str, num_bytes: int) -> None:
        with self._lock:
            if self._is_closed:
                return
            if self._progress is None:
                self._progress = Progress("downloading", self._count_all())
            was_here = path not in self._num_here
            self._progress.add_input(num_bytes - self._num_here.get(path, 0), was_here)
            self._num_here[path] = num_bytes


def bar_for(note: Note | None) -> type:
    """A class that `huggingface_hub` takes for that of its bars, and that shows nothing but calls `note`."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, initial: int = 0, total: int | None = None, **kwargs: Any):
            super().__init__(initial=initial, total=total, disable=True)
            self._tell(initial or 0)

        def update(self, n: float | None = 1) -> None:
            self._tell(self.n + (n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes of the network, which with Xet are not those of the file: having this, there is one bar."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """See `update_transfer`."""

        def _tell(self, n: float) -> None:
            self.n = n
            if note is not None:
                note(int(n))

    return Bar
