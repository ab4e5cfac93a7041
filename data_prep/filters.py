"""The filters of a corpus, one text at a time: datatrove's rules, in one order, each a pure function of the text.

In: `Filters` and a text. Out: an `Outcome`: the text as it goes on, or the rule that leaves it out. What depends on
other documents (duplicates) is decided in data_prep/screening.py and handed in. datatrove is imported when the first
filter is made, never where none is on.
"""

import importlib.util
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.filter_settings import CHANGING, NEEDS_DATATROVE, NOTHING_LEFT, OTHER, SCREENED, Filters
from data_prep.readers import Piece, Record
from data_prep.words import check_language

INSTALL = "python -m pip install -c constraints.txt -e '.[corpus]'"
FENCED = re.compile(r"^(?P<fence>```+|~~~+)[^\n]*\n.*?^(?P=fence)[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
Step = Callable[[str], tuple[str, str | None]]  # a text to itself or what it is changed to, and why it is left out


@dataclass
class Outcome:
    """What became of a text. `rule` names why it is left out; `changes` are (filter, text before, text after)."""

    text: str
    rule: str | None = None
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    ngrams: list[int] = field(default_factory=list)  # those of the evaluation sets that it has, as hashes


class Chain:
    """The filters that look at one text, ready to run.

    Args:
        index: The n-grams of the evaluation sets (data_prep/decontamination.py), where it looks for any.
    """

    def __init__(self, filters: Filters, index: Path):
        if multiprocessing.parent_process() is not None:
            # A worker has no use for torch, which spaCy imports where there is one: seconds, and 300 MB each.
            sys.modules.setdefault("torch", None)
        self.filters = filters
        self.steps: list[tuple[str, Step]] = []
        self._ngrams: list[int] = []
        for name, options in filters.options.items():
            if name not in SCREENED:
                self.steps.append((name, self._make_step(name, options, index)))

    def run(self, text: str, is_code: bool, decided: str | None = None, is_decided: bool = False) -> Outcome:
        """Run a text through the filters, in order, until one leaves it out.

        Args:
            is_code: Whether it is a file of code, which normalize leaves as it is unless asked.
            is_decided: Whether the filters ran before: then only what changes it runs, up to the rule `decided`.
        """
        outcome = Outcome(text)
        for name, step in self.steps:
            has_rule = decided is not None and decided.partition(":")[0] == name
            if name == "normalize" and is_code and not self.filters.options[name]["code"]:
                continue
            if is_decided and not has_rule and name not in CHANGING and not self._only_marks(name):
                continue
            after, reason = step(outcome.text)
            if name == "decontaminate":
                outcome.ngrams, self._ngrams = self._ngrams, []
            if reason is not None:
                outcome.rule = self._rule(name, reason)
                return outcome
            if after != outcome.text:
                if not after.strip():
                    outcome.rule = self._rule(name, NOTHING_LEFT)
                    return outcome
                outcome.changes.append((name, outcome.text, after))
                outcome.text = after
        return outcome

    def clean(self, text: str, is_code: bool) -> str | None:
        """The text as the filters change it, without those that only leave texts out; None if nothing is left."""
        for name, step in self.steps:
            if name in CHANGING and not (name == "normalize" and is_code and not self.filters.options[name]["code"]):
                text, reason = step(text)
                if reason is not None or not text.strip():
                    return None
        return text

    def _only_marks(self, name: str) -> bool:
        return name == "decontaminate" and not self.filters.options[name]["remove"]

    def _rule(self, name: str, reason: str) -> str:
        for rule in (name, f"{name}: {reason.removeprefix('gopher_')}"):
            if rule in self.filters.rules:
                return rule
        return f"{name}: {OTHER}"

    def _make_step(self, name: str, options: dict[str, Any], index: Path) -> Step:
        options = dict(options)
        if "language" in options:
            check_language(name, options["language"])
        if name == "normalize":
            return _normalize(options)
        if name == "language":
            return _language(**options)
        if name == "pii":
            return _mask(options)
        if name == "decontaminate":
            return self._decontaminate(options, index)
        from datatrove.pipeline import filters

        made = {
            "gopher_repetition": filters.GopherRepetitionFilter,
            "gopher_quality": filters.GopherQualityFilter,
            "c4": filters.C4QualityFilter,
            "fineweb": filters.FineWebQualityFilter,
        }[name](**options)
        return _quality(made.filter)

    def _decontaminate(self, options: dict[str, Any], index: Path) -> Step:
        from data_prep.decontamination import Finder

        finder = Finder(index, options["n_grams"], options["language"])

        def find(text: str) -> tuple[str, str | None]:
            self._ngrams = finder.find(text)
            return text, "found" if self._ngrams and options["remove"] else None

        return find


def iter_clean(records: Iterable[Record], pieces: tuple[Piece, ...], filters: Filters) -> Iterator[Record]:
    """Records with their texts as the filters change them; those without a text then are left out."""
    changing = {name: options for name, options in filters.options.items() if name in CHANGING and name not in SCREENED}
    chain = Chain(replace(filters, options=changing), Path())
    is_code = {piece.file: piece.format == "python" for piece in pieces}
    for record in records:
        text = chain.clean(record.text, is_code[record.file])
        if text is not None:
            yield replace(record, text=text)


def check_installed(filters: Filters) -> None:
    """Say how to install what these filters need.

    Raises:
        UserError: something is missing.
    """
    needed = {"datatrove": "datatrove", "spacy": "spacy"} if NEEDS_DATATROVE & set(filters.options) else {}
    needed |= {"ftfy": "ftfy"} if "normalize" in filters.options else {}
    needed |= {"fasttext": "fasttext-community"} if "language" in filters.options else {}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"filters: {', '.join(filters.options)} need {', '.join(missing)}, which is not installed. "
            f"Install it: {INSTALL}"
        )


def _quality(judge: Callable[[Any], bool | tuple[bool, str]]) -> Step:
    from datatrove.data import Document

    def step(text: str) -> tuple[str, str | None]:
        document = Document(text=text, id="")
        result = judge(document)
        is_kept, reason = result if isinstance(result, tuple) else (result, OTHER)
        return document.text, None if is_kept else reason

    return step


def _normalize(options: dict[str, Any]) -> Step:
    from datatrove.pipeline.formatters import FTFYFormatter

    touches_code = options.pop("code")
    fix = FTFYFormatter(**options).format

    def step(text: str) -> tuple[str, str | None]:
        if touches_code or ("```" not in text and "~~~" not in text):
            return fix(text), None
        parts, end = [], 0
        for fenced in FENCED.finditer(text):
            parts += [fix(text[end : fenced.start()]), fenced[0]]
            end = fenced.end()
        return "".join([*parts, fix(text[end:])]), None

    return step


def _mask(options: dict[str, Any]) -> Step:
    from datatrove.pipeline.formatters import PIIFormatter

    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    formatter = PIIFormatter(**options)

    def step(text: str) -> tuple[str, str | None]:
        # It takes its replacements in turn; each text begins with the first, whatever was masked before it.
        formatter.emails_replacer._replace_i = formatter.ip_replacer._replace_i = 0
        return formatter.format(text), None

    return step


def _language(model: str, keep: list[str], threshold: float) -> Step:
    from datatrove.data import Document
    from datatrove.utils.lid import FT176LID
    from fasttext.FastText import _FastText

    detector = FT176LID(keep)
    try:
        detector._model = _FastText(model)  # which it would download
    except ValueError as error:
        raise UserError(f"filters.language.model is {model} but fastText cannot load it ({error}).") from error

    def step(text: str) -> tuple[str, str | None]:
        _, scores = detector.predict(Document(text=text, id=""))
        return text, None if any(score > threshold for score in scores.values()) else "another language"

    return step
