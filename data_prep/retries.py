"""Asking again, for servers that are busy, slow or away for a moment.

In: something to do. Out: its result, after as many tries as it takes; or a sentence that says what to do. The waits
grow, are never in step with those of other processes (jitter), and are at least as long as the server asks for
(Retry-After).
"""

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from data_prep.errors import UserError

RETRY_WAITS_S = (1, 2, 4, 8, 16, 32)
LONGEST_WAIT_S = 600  # a server that asks for more is not waited for
PASSING_STATUS = (408, 429, 500, 502, 503, 504)
Result = TypeVar("Result")


class StoppedError(Exception):
    """The preparation ended while this was waited for."""


def try_again(
    action: Callable[[], Result],
    what: str,
    is_passing: Callable[[BaseException], bool],
    explain: Callable[[BaseException], str],
    waits_s: Sequence[float] | None = None,
    stop: threading.Event | None = None,
) -> Result:
    """`action()`, tried again with growing waits as long as its error is a passing one.

    Args:
        what: What is asked for, for the line that tells of a wait.
        waits_s: Between the tries; None is RETRY_WAITS_S.
        is_passing: Whether waiting may help against an error.
        explain: The message for an error that stays.
        stop: Set when nobody wants the result any more.
    Raises:
        UserError: what `explain` says.
        StoppedError: `stop` was set.
    """
    for wait_s in (*(RETRY_WAITS_S if waits_s is None else waits_s), None):
        if stop is not None and stop.is_set():
            raise StoppedError
        try:
            return action()
        except (UserError, StoppedError):
            raise
        except Exception as error:
            asked_s = retry_after_s(error) or 0
            if wait_s is None or not is_passing(error) or asked_s > LONGEST_WAIT_S:
                raise UserError(explain(error)) from error
            wait_s = max(wait_s * random.uniform(0.75, 1.25), asked_s)
            reason = status_of(error) or type(error).__name__
            print(f"{what}: {reason}, next try in {wait_s:.3g} s", file=sys.stderr, flush=True)
            if stop is not None:
                stop.wait(wait_s)
            else:
                time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of any of the HTTP libraries; None if there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def retry_after_s(error: BaseException) -> float | None:
    """What the server asks to wait, of its header Retry-After: seconds, or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None) or {}
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
