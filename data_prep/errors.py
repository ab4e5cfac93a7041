"""The one exception for what a user can mend, and the search for the word they meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend; every command shows it as `error: <message>`, without a traceback, with exit code 2.

    The message reads `<file>: <key> is <value> but <conflict>. <consequence>. <exact remedy>.`
    """


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices that look like `word`, best first, at most three; empty when none does."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)
    return [by_lower[lower] for lower in found]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`Did you mean a or b?` when something looks like `word`, else `Known: a, b, c.`"""
    choices = list(choices)
    close = nearest(word, choices)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(sorted(choices)) or 'none'}."
