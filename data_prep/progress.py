"""One progress bar for long work: a tqdm bar on a terminal, a line every half minute elsewhere."""

import sys
import time

from data_prep.sizes import format_bytes, format_count

LINE_EVERY_S = 30


class Progress:
    """Counts input read (the bar), text bytes and tokens (beside it)."""

    def __init__(self, what: str, total_bytes: int | None):
        self.what, self.total_bytes = what, total_bytes
        self.num_input_bytes = self.num_text_bytes = self.num_tokens = 0
        self.started_s = self.last_line_s = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, smoothing=0.05)

    def add_text(self, num_bytes: int, num_tokens: int) -> None:
        """Text was worked on; the input it came from is counted when its unit is done."""
        self.num_text_bytes += num_bytes
        self.num_tokens += num_tokens
        if self.bar is not None:
            self.bar.set_postfix_str(self._speed(), refresh=False)
            self.bar.update(0)
        elif time.monotonic() - self.last_line_s >= LINE_EVERY_S:
            self.last_line_s = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def add_input(self, num_bytes: int) -> None:
        """A part of the input is done."""
        self.num_input_bytes += num_bytes
        if self.bar is not None:
            self.bar.update(num_bytes)

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self.started_s, 1e-9)
        speed = f"{self.num_text_bytes / seconds / 1e6:.1f} MB/s of text"
        return speed + (f", {format_count(int(self.num_tokens / seconds))} tokens/s" if self.num_tokens else "")

    def _line(self) -> str:
        done = format_bytes(self.num_input_bytes)
        if self.total_bytes:
            seconds = time.monotonic() - self.started_s
            left_s = seconds * (self.total_bytes / self.num_input_bytes - 1) if self.num_input_bytes else None
            done += f" of {format_bytes(self.total_bytes)}" + (
                f", {max(left_s, 0) / 60:.0f} min left" if left_s is not None else ""
            )
        return (
            f"{self.what}: {done}, {format_bytes(self.num_text_bytes)} of text, {format_count(self.num_tokens)} "
            f"tokens, {self._speed()}"
        )
