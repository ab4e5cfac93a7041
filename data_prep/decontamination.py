"""Evaluation sets in the corpus: documents that share an n-gram of words with an item, and the items themselves.

In: JSON lines files, an item of an evaluation set each. Out: an index of their n-grams, what of it a text has, and
after the preparation documents/contaminated.jsonl: the items that were found, so that a score can also be given
without them. Words are those of datatrove's decontamination: lower case, without punctuation, numbers as 0.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.filter_settings import Filters
from data_prep.words import load_words

INDEX_NAME = "ngrams.npy"  # in the working folder


class Finder:
    """Looks for the n-grams of an index in texts."""

    def __init__(self, index: Path, n: int, language: str):
        self.index = np.load(index)  # sorted
        self.n, self.language = n, language

    def find(self, text: str) -> list[int]:
        """The hashes of the index's n-grams that the text has, sorted."""
        hashes = np.array(list(hash_ngrams(text, self.n, self.language)), dtype=np.uint64)
        return np.intersect1d(hashes, self.index).tolist()


def hash_ngrams(text: str, n: int, language: str) -> dict[int, str]:
    """The n-grams of a text by their hashes, as datatrove makes them (NGramsDecontFilter)."""
    simplify, ngrams, hash_text = _parts()
    words = load_words(language).word_tokenize(simplify(text))
    return {hash_text(ngram): ngram for ngram in map(" ".join, ngrams(words, n))}


def write_index(filters: Filters, path: Path) -> list[str]:
    """Write the n-grams of all evaluation files.

    Returns:
        A line for people about each file.
    Raises:
        UserError: a line that is no JSON object, or a file without one item that is long enough.
    """
    options = filters.options["decontaminate"]
    hashes: set[int] = set()
    lines = []
    for file in options["files"]:
        found = [ngrams for _, ngrams in _iter_items(file, options)]
        if not any(found):
            raise UserError(
                f"filters.decontaminate: {file} has {len(found):,} items but none of {options['n_grams']} words, so "
                "that nothing of it can be looked for. Give another file, or a smaller n_grams."
            )
        hashes.update(*found)
        num_short = sum(not ngrams for ngrams in found)
        short = f", {num_short:,} of fewer than {options['n_grams']} words, which are not" if num_short else ""
        lines.append(f"decontaminate: {len(found):,} items of {file} are looked for{short}")
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, np.array(sorted(hashes), dtype=np.uint64))
    temporary.replace(path)
    return lines


def mark_items(filters: Filters, found: dict[int, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The items of the evaluation files of which an n-gram was found.

    Args:
        found: The documents that have an n-gram, by its hash, each with `source`, `record`, and `removed`.
    """
    options = filters.options["decontaminate"]
    for file in options["files"]:
        for line, ngrams in _iter_items(file, options):
            here = [number for number in ngrams if number in found]
            if not here:
                continue
            documents = {(each["source"], each["record"]): each for number in here for each in found[number]}
            first = min(documents)
            yield {
                "file": file,
                "line": line + 1,
                "num_documents": len(documents),
                "num_documents_left": sum(not each["removed"] for each in documents.values()),
                "ngram": next(ngrams[number] for number in here if documents[first] in found[number]),
                "source": first[0],
                "record": first[1],
            }


def _iter_items(path: str, options: dict[str, Any]) -> Iterator[tuple[int, dict[int, str]]]:
    """Line number from 0 and n-grams of each item: of all its texts, in the order in which they stand in it."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise ValueError(f"a JSON {type(item).__name__}, not an object")
            except ValueError as error:
                raise UserError(
                    f"{path}: line {number + 1}: {error}. filters.decontaminate takes JSON lines, an item each."
                ) from error
            yield number, hash_ngrams("\n".join(_iter_texts(item)), options["n_grams"], options["language"])


def _iter_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _iter_texts(each)


@cache
def _parts() -> tuple[Any, ...]:
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import ngrams, simplify_text

    # sha1: datatrove's other hash needs an xxhash before 4, and `datasets` has the newer one here
    return simplify_text, ngrams, create_hash_func(HashConfig(hash_fc="sha1"))
