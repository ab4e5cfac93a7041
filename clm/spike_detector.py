"""Is this step's loss or gradient norm out of line with the steps before it?

In: loss and gradient norm of one step. Out: how many robust deviations each lies above the last `window` good steps.

    z = (x - median) / max(1.4826 x MAD, floor)      x = the loss, and x = log(gradient norm)

    losses before: 3.00 3.10 2.90 3.05 2.95     median 3.00, MAD 0.05, 1.4826 x MAD = 0.074
    this loss:     4.00                         z = 1.00 / 0.074 = 13.5: a spike at a threshold of 10

1.4826 x MAD is the standard deviation of normal noise. The gradient norm is judged by its logarithm, because its noise
multiplies: a harmless step may have several times the usual norm.
A step is bad where z is above the threshold, upwards only, or where a number is NaN or Inf. Bad steps do not enter the
history. All of it is tensor arithmetic without a look at a value, so that it runs on a GPU without waiting for it, and
gives the same on every process that is given the same numbers.
Source: P. Rousseeuw and C. Croux, "Alternatives to the Median Absolute Deviation", JASA 1993 (MAD and its constant).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MIN_HISTORY = 32  # good steps before anything is called high; a smaller window needs as many as it holds
NEW_LEVEL = 32  # after so many bad steps in a row they are the new normal, and the history begins anew
# However quiet the steps before were, a deviation is at least 1 % of the median loss and a factor of e^0.25 in the
# gradient norm: at a threshold of 10 a spike is a loss 10 % above, or a norm 12 times, the median.
LOSS_FLOOR, LOG_NORM_FLOOR = 0.01, 0.25

COLUMNS = ("loss", "grad_norm", "z_loss", "z_grad_norm", "median_loss", "median_grad_norm", "num_before", "is_bad")


class Verdict(NamedTuple):
    """One step as the detector saw it: a row of COLUMNS, read on the host."""

    step: int
    learning_rate: float | None
    loss: float
    grad_norm: float
    z_loss: float
    z_grad_norm: float
    median_loss: float
    median_grad_norm: float
    num_before: int
    is_bad: bool


class Detector:
    """The history of the last good steps and the judgement of the next one.

    Args:
        window: good steps that are remembered.
        threshold: robust deviations above the median that make a step bad.
        device: where the numbers are.
    """

    def __init__(self, window: int, threshold: float, device: torch.device | str = "cpu"):
        self.window = window
        self.threshold = threshold
        self.needed = min(MIN_HISTORY, window)
        self.history = torch.full((2, window), torch.nan, device=device)  # loss; log norm. NaN: not there yet
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # good steps since the history began
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # bad steps in a row
        self.relative_floor = torch.tensor([LOSS_FLOOR, 0.0], device=device)
        self.absolute_floor = torch.tensor([1e-12, LOG_NORM_FLOOR], device=device)

    def judge(self, values: torch.Tensor) -> torch.Tensor:
        """Judge one step and remember it if it is good.

        Args:
            values: (2,) float32 loss and gradient norm (0: unknown), on the detector's device.
        Returns:
            (8,) float32: COLUMNS. z is 0 while the history is too short.
        """
        num_before = self.count.clamp(max=self.window)
        levels = torch.stack([values[0], values[1].clamp(min=1e-30).log()])
        medians = _middle(self.history, num_before)
        spread = 1.4826 * _middle((self.history - medians[:, None]).abs(), num_before)
        spread = torch.maximum(spread, self.relative_floor * medians.abs() + self.absolute_floor)
        z = torch.where(num_before >= self.needed, (levels - medians) / spread, 0.0)
        is_bad = ((z > self.threshold) | ~torch.isfinite(values)).any()
        self._remember(levels, is_bad)
        return torch.stack([*values, *z, medians[0], medians[1].exp(), num_before.float(), is_bad.float()])

    def _remember(self, levels: torch.Tensor, is_bad: torch.Tensor) -> None:
        slot = (self.count % self.window).expand(2, 1)
        kept = torch.where(is_bad, self.history.gather(1, slot), levels[:, None])
        self.history.scatter_(1, slot, kept)
        self.count += ~is_bad
        self.streak.copy_(torch.where(is_bad, self.streak + 1, 0))
        is_new_level = self.streak == NEW_LEVEL
        self.history.masked_fill_(is_new_level, torch.nan)
        self.count.masked_fill_(is_new_level, 0)
        self.streak.masked_fill_(is_new_level, 0)

    def clear(self) -> None:
        """Forget everything: what comes is another level, not a spike."""
        self.history.fill_(torch.nan)
        self.count.zero_()
        self.streak.zero_()

    def state(self) -> dict[str, Any]:
        """The history as plain numbers, oldest first; waits for the device."""
        count = int(self.count)
        slots = [i % self.window for i in range(max(0, count - self.window), count)]
        loss, log_grad_norm = self.history.cpu()[:, slots].tolist()
        return {"loss": loss, "log_grad_norm": log_grad_norm, "bad_in_a_row": int(self.streak)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; with a smaller window its newest steps are used."""
        self.clear()
        values = torch.tensor([state["loss"], state["log_grad_norm"]], dtype=torch.float32)[:, -self.window :]
        self.history[:, : values.shape[1]] = values.to(self.history.device)
        self.count.fill_(values.shape[1])
        self.streak.fill_(state["bad_in_a_row"])


def _middle(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(2,) medians of the rows' `count` numbers; NaN, which sorts to the end, is none. NaN where count is 0."""
    ordered = values.sort(dim=1).values
    lower = ((count - 1).clamp(min=0) // 2).expand(2, 1)
    upper = (count // 2).clamp(max=values.shape[1] - 1).expand(2, 1)
    return (0.5 * (ordered.gather(1, lower) + ordered.gather(1, upper))).squeeze(1)
