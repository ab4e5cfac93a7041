"""What makes two documents, or two lines, the same: 64-bit hashes, and which of them were seen before.

In: texts. Out: for each a hash of all its bytes, the keys of its MinHash bands (near-duplicates share one with high
probability), and the hashes of its lines. `Seen` answers for hashes in order whether each was there before.
"""

from functools import cache
from typing import Any

import numpy as np
import xxhash

from data_prep.words import load_words


class Seen:
    """The hashes so far, in sorted runs of growing size: 8 bytes each; a logarithm of their number to look one up."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes, in order; whether each was there before it, among these or earlier ones: bool (N,)."""
        unique, first = np.unique(hashes, return_index=True)
        is_known = np.zeros(len(unique), dtype=bool)
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            is_known |= run[at] == unique
        is_first = np.zeros(len(hashes), dtype=bool)
        is_first[first[~is_known]] = True
        new = unique[~is_known]
        while self.runs and len(self.runs[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate([self.runs.pop(), new]), kind="stable")
        if len(new):
            self.runs.append(new)
        return ~is_first


def hash_bytes(data: bytes) -> int:
    """64 bits of XXH3."""
    return xxhash.xxh3_64_intdigest(data)


def hash_bands(text: str, options: dict[str, Any]) -> list[int] | None:
    """A key for each band of the text's MinHash signature, which is datatrove's; None for a text with no n-gram."""
    signer = _signer(*(options[key] for key in ("n_grams", "num_buckets", "hashes_per_bucket", "seed", "language")))
    shingles = signer.get_shingles(text)
    if not shingles.size:
        return None
    return [hash_bytes(np.array(band, dtype=np.uint64).tobytes()) for band in signer.get_signature(shingles)]


def hash_lines(text: str, min_characters: int) -> list[tuple[int, int]]:
    """Number and hash of each line of a text that is long enough; spaces around a line do not count."""
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n")))
    return [(number, hash_bytes(line.encode())) for number, line in lines if len(line) >= min_characters]


def remove_lines(text: str, numbers: set[int]) -> str:
    """The text without the lines of these numbers."""
    return "\n".join(line for number, line in enumerate(text.split("\n")) if number not in numbers)


@cache
def _signer(n_grams: int, num_buckets: int, hashes_per_bucket: int, seed: int, language: str) -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    # sha1: datatrove's other hash needs an xxhash before 4, and `datasets` has the newer one here
    config = MinhashConfig(n_grams, num_buckets, hashes_per_bucket, seed, hash_config=HashConfig(hash_fc="sha1"))
    signer = MinhashDedupSignature("/nonexistent", config, language)  # the folder is for its own files: none is written
    signer.word_tokenizer = load_words(language)
    return signer
