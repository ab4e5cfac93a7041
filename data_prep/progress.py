"""One line of progress for each stage of long work: a tqdm bar on a terminal, a plain line every half minute elsewhere.

In: what was done, as it is done. Out: on stderr how much of the stage is done, MB/s of text, tokens/s and the time
left. What an earlier attempt did counts as done, and never as speed.
"""

import sys
import time

from data_prep.sizes import format_bytes, format_count

LINE_EVERY_S = 30
BAR_EVERY_S = 0.2


class Progress:
    """The progress of one stage.

    Args:
        stage: Its name: `encoding`.
        total: All there is to do, in units; None where nobody knows, and then no time left is shown.
        unit: What is counted: "B" for bytes, else a word such as "tokens".
    """

    def __init__(self, stage: str, total: int | None, unit: str = "B"):
        self.stage, self.total, self.unit = stage, total, unit
        self.num_done = self.num_done_before = self.num_text_bytes = self.num_tokens = 0
        self.started_s = self.last_line_s = self.last_drawn_s = time.monotonic()
        self.has_printed = False
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            suffix = "B" if unit == "B" else f" {unit}"
            known = f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}}{suffix} [{{elapsed}}<{{remaining}}{{postfix}}]"
            unknown = f"{{desc}}: {{n_fmt}}{suffix} [{{elapsed}}{{postfix}}]"
            # smoothing 0: the time left follows from the mean speed, which leaves out what `initial` counts
            self.bar = tqdm(
                total=total,
                desc=stage,
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0,
                bar_format=known if total else unknown,
            )

    def add_text(self, num_bytes: int, num_tokens: int) -> None:
        """Text was worked on now; what it was made from is counted by `add_input` when its unit is done."""
        self.num_text_bytes += num_bytes
        self.num_tokens += num_tokens
        self._show()

    def add_input(self, num: int, was_done: bool = False) -> None:
        """So many units are done.

        Args:
            was_done: By an earlier attempt: they took no time of this one.
        """
        self.num_done += num
        if self.total:  # which was estimated, where input is compressed
            self.total = max(self.total, self.num_done)
        if was_done:
            self.num_done_before += num
        self._show()

    def finish(self) -> None:
        """Everything is done: a total that was estimated is known now."""
        if self.total:
            self.total = self.num_done

    def close(self) -> None:
        """End the bar; where lines were printed, a last one says how it ended. May be called again."""
        if self.bar is not None:
            self._draw()
            self.bar.close()
        elif self.has_printed:
            self._print_line()
        self.bar, self.has_printed = None, False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.finish()
        self.close()

    def describe_speed(self) -> str:
        """What was done now by the time that it took: `24.1 MB/s of text, 6.02 M tokens/s`."""
        seconds = max(time.monotonic() - self.started_s, 1e-9)
        speeds = []
        if self.num_text_bytes:
            speeds.append(f"{self.num_text_bytes / seconds / 1e6:.1f} MB/s of text")
        elif self.unit == "B" and self.num_done > self.num_done_before:
            speeds.append(f"{(self.num_done - self.num_done_before) / seconds / 1e6:.1f} MB/s")
        if self.num_tokens:
            speeds.append(f"{format_count(int(self.num_tokens / seconds))} tokens/s")
        return ", ".join(speeds)

    def seconds_left(self) -> float | None:
        """The rest at the speed of what was done now; None where the total is not known, or nothing was done yet."""
        num_now = self.num_done - self.num_done_before
        if not self.total or not num_now:
            return None
        return max(self.total - self.num_done, 0) / num_now * (time.monotonic() - self.started_s)

    def _show(self) -> None:
        if self.bar is not None:
            if time.monotonic() - self.last_drawn_s >= BAR_EVERY_S:
                self._draw()
        elif time.monotonic() - self.last_line_s >= LINE_EVERY_S:
            self._print_line()

    def _draw(self) -> None:
        self.last_drawn_s = time.monotonic()
        self.bar.n, self.bar.initial, self.bar.total = self.num_done, self.num_done_before, self.total
        self.bar.set_postfix_str(self.describe_speed(), refresh=True)

    def _print_line(self) -> None:
        self.last_line_s, self.has_printed = time.monotonic(), True
        show = format_bytes if self.unit == "B" else lambda num: f"{format_count(num)} {self.unit}"
        parts = [show(self.num_done)]
        if self.total:
            parts[0] += f" of {show(self.total)} ({self.num_done / self.total:.0%})"
        if self.num_done_before:
            parts.append(f"{show(self.num_done_before)} of it before")
        if self.num_text_bytes:
            parts.append(f"{format_bytes(self.num_text_bytes)} of text")
        parts.append(self.describe_speed())
        seconds = self.seconds_left()
        if seconds is not None:
            parts.append(f"{_clock(seconds)} left")
        print(f"{self.stage}: {', '.join(part for part in parts if part)}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
