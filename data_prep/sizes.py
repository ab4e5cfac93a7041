"""Counts and bytes as a person writes them (`10B`, `262_144`, `2GB`) to integers, and back.

All prefixes are decimal: 1M = 1,000,000 and 1GB = 10**9 bytes.
"""

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
BYTE_SUFFIXES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
NUMBER = re.compile(r"([+-]?[0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")


def parse_count(value: int | float | str) -> int:
    """A whole number >= 0 from `10B`, `2M`, `350K`, `262_144`, `1e9` or a number.

    Raises:
        ValueError: bool, negative, NaN, infinite, not a whole number, unknown suffix.
    """
    return _parse(value, COUNT_SUFFIXES, "a count like 10_000, 350K, 2M, 10B or 1T")


def parse_bytes(value: int | float | str) -> int:
    """A number of bytes >= 0 from `2GB`, `500MB`, `1_000_000` or a number.

    Raises:
        ValueError: as `parse_count`.
    """
    return _parse(value, BYTE_SUFFIXES, "a size like 500MB, 2GB or 1_000_000")


def format_count(count: int) -> str:
    """`9.97 B`, `33.3 k`, `812`: three digits, for people."""
    return _format(count, ("", "k", "M", "B", "T"))


def format_bytes(num_bytes: int) -> str:
    """`28.5 GB`, `812 B`: three digits, for people."""
    return _format(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def _parse(value: int | float | str, suffixes: dict[str, int], wanted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not {wanted}")
    match = NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, str):
        if match is None or match[2].upper() not in suffixes:
            raise ValueError(f"{value!r} is not {wanted}")
        try:
            number = Decimal(match[1].replace("_", "").replace(",", "")) * suffixes[match[2].upper()]
        except InvalidOperation:
            raise ValueError(f"{value!r} is not {wanted}") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} is not {wanted}")
    else:
        number = Decimal(value)
    if number < 0:
        raise ValueError(f"{value!r} is negative; wanted is {wanted}")
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number; wanted is {wanted}")
    return int(number)


def _format(number: int, units: tuple[str, ...]) -> str:
    size, unit = float(number), 0
    while abs(size) >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    text = f"{size:.0f}" if unit == 0 or size >= 99.95 else f"{size:.3g}"
    return f"{text} {units[unit]}".rstrip()


def format_table(rows: list[Sequence[str]], is_text: bool = False) -> list[str]:
    """Lines with columns of one width: the first to the left, the others to the right, or to the left as `is_text`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = ["<", *("<" if is_text else ">" for _ in widths[1:])]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]
