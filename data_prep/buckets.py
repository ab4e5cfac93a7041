"""Buckets: one dataset for each range of a score, out of one reading of the text.

In: `{"low": "score < 3", "high": "score >= 3"}`. Out: `Bucket`s, and for a document's columns the bucket that holds it.
No document can be in two: conditions that some value fulfils together are refused before anything is read. A missing
value fulfils no condition.
"""

import itertools
import json
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError

OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
TAKEN_NAMES = ("train", "validation", "documents", "tokenizer")  # a dataset's own folders
TERM = re.compile(
    r"\s*(?P<column>[A-Za-z_][\w.-]*)\s*(?P<operator><=|>=|==|!=|<|>)\s*"
    r"""(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])|"(?P<text>[^"]*)"|'(?P<text_2>[^']*)')\s*"""
)


@dataclass(frozen=True)
class Term:
    """One comparison of a column with a value."""

    column: str
    operator: str
    value: int | float | str

    def holds(self, value: Any) -> bool:
        """Whether a value fulfils it; a missing one (None, NaN) never does."""
        return is_there(value) and OPERATORS[self.operator](value, self.value)


@dataclass(frozen=True)
class Bucket:
    """A name, and the terms that a document must fulfil, all of them."""

    name: str
    terms: tuple[Term, ...]

    @property
    def condition(self) -> str:
        """The condition, in one spelling."""
        return " and ".join(f"{t.column} {t.operator} {json.dumps(t.value, ensure_ascii=False)}" for t in self.terms)


def is_there(value: Any) -> bool:
    """Whether a column has a value: neither null nor NaN."""
    return value is not None and value == value


def parse_buckets(conditions: dict[str, Any], key: str) -> tuple[Bucket, ...]:
    """Buckets from their conditions by name, sorted by name: the order in which they are written means nothing.

    Args:
        key: how the place is named in messages, in front of a bucket's name: "buckets." or "--buckets ".
    Raises:
        UserError: a name that is no plain folder name, a condition that is none.
    """
    buckets = []
    for name, condition in sorted(conditions.items(), key=lambda item: str(item[0])):
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN_NAMES:
            raise UserError(
                f"{key}{name}: is no name for a bucket, which becomes a folder: letters, digits, - and _, and none of "
                f"{', '.join(TAKEN_NAMES)}. Write for example high: score >= 3 (--buckets 'high=score >= 3')."
            )
        terms = _parse_condition(condition) if isinstance(condition, str) else None
        if terms is None:
            raise UserError(
                f"{key}{name}: is {condition!r} but must compare a column with a number or a text in quotes, by one of "
                f"{' '.join(OPERATORS)}; several are joined by `and`. Write for example score >= 3, or "
                'score >= 3 and language == "en".'
            )
        buckets.append(Bucket(name, terms))
    return tuple(buckets)


def split_conditions(words: Iterable[str]) -> dict[str, str]:
    """The words of `--buckets`, `name=condition` each, as conditions by name.

    Raises:
        UserError: a word without `=`, or a name given twice.
    """
    conditions: dict[str, str] = {}
    for word in words:
        name, equals, condition = word.partition("=")
        if not equals or name in conditions:
            what = "names a bucket for the second time" if equals else "has no name"
            raise UserError(
                f"prep: --buckets is {word!r} but {what}. Write --buckets 'low=score < 3' 'high=score >= 3'."
            )
        conditions[name] = condition
    return conditions


def condition_columns(buckets: tuple[Bucket, ...], keep_columns: dict[str, str], key: str) -> dict[str, str]:
    """The columns of the conditions with their types: the kept columns' own, else float64 or string.

    Raises:
        UserError: a text compared with numbers or the reverse, or two buckets that a document could be in together.
    """
    columns: dict[str, str] = {}
    for bucket in buckets:
        for term in bucket.terms:
            is_text = isinstance(term.value, str)
            kind = columns.setdefault(term.column, keep_columns.get(term.column, "string" if is_text else "float64"))
            if is_text != (kind == "string"):
                raise UserError(
                    f"{key}{bucket.name}: is {bucket.condition!r} but the column {term.column} is read as {kind}. "
                    f"Compare it with {'a text in quotes' if kind == 'string' else 'a number'}."
                )
    for first, second in itertools.combinations(buckets, 2):
        example = _find_common(first, second, columns)
        if example is not None:
            raise UserError(
                f"{key}{first.name}: is {first.condition!r} but {second.name} is {second.condition!r}: a document with "
                f"{example} would be in both. Change one, so that no document can be in two."
            )
    return columns


def find_bucket(buckets: tuple[Bucket, ...], values: dict[str, Any]) -> int | None:
    """The number of the one bucket whose condition a document's columns fulfil; None when there is none."""
    for number, bucket in enumerate(buckets):
        if all(term.holds(values[term.column]) for term in bucket.terms):
            return number
    return None


def bucket_names(buckets: tuple[Bucket, ...]) -> list[str]:
    """The names of the datasets that one preparation makes: the buckets', or [""] for the one without buckets."""
    return [bucket.name for bucket in buckets] or [""]


def column_names(buckets: tuple[Bucket, ...]) -> list[str]:
    """The columns that the conditions look at, in order."""
    return list(dict.fromkeys(term.column for bucket in buckets for term in bucket.terms))


def _parse_condition(text: str) -> tuple[Term, ...] | None:
    terms, position = [], 0
    while match := TERM.match(text, position):
        number = match["number"]
        if number is not None:
            value = int(number) if re.fullmatch(r"-?\d+", number) else float(number)
        else:
            value = match["text"] if match["text"] is not None else match["text_2"]
        terms.append(Term(match["column"], match["operator"], value))
        if match.end() == len(text):
            return tuple(terms)
        joint = re.compile(r"and\s").match(text, match.end())
        if joint is None:
            return None
        position = joint.end()
    return None


def _find_common(first: Bucket, second: Bucket, columns: dict[str, str]) -> str | None:
    """Values that fulfil both conditions, as `score 3`; None when there are none.

    Terms of different columns do not touch each other, so it is enough to find a value for each column. Between two
    neighbouring values of the terms, nothing that a term says changes: a few candidates stand for all values.
    """
    terms = (*first.terms, *second.terms)
    found = []
    for column in column_names((first, second)):
        here = [term for term in terms if term.column == column]
        candidates = _candidates(sorted({term.value for term in here}), columns[column])
        value = next((each for each in candidates if all(term.holds(each) for term in here)), None)
        if value is None:
            return None
        found.append(f"{column} {json.dumps(value, ensure_ascii=False)}")
    return " and ".join(found)


def _candidates(values: list, kind: str) -> list:
    """For sorted values: each one, and one of every gap between and beside them that a value of the type can lie in."""
    if kind == "string":
        return [*values, "", *(value + "\0" for value in values)]
    if kind == "int64":
        return [each for value in values for each in (math.floor(value), math.floor(value) + 1, math.ceil(value) - 1)]
    between = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    return [*values, *between, values[0] - 1, values[-1] + 1, -math.inf, math.inf]
