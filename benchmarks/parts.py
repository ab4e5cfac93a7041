"""Where does the time of a preparation go? One process (--num-proc 1), each part timed where it is called.

    python benchmarks/parts.py FILES TOKENIZER OUT         called by benchmarks/data_prep.py --parts

A part's seconds are its own: those of a part inside it are taken off.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in front of this folder, which has a data_prep.py

SECONDS: dict[str, float] = defaultdict(float)
_stack: list[float] = []  # seconds of the parts inside each part that is running


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its own time added to a part."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started_at = time.perf_counter()
        _stack.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            whole = time.perf_counter() - started_at
            SECONDS[part] += whole - _stack.pop()
            if _stack:
                _stack[-1] += whole

    return wrapper


def timed_records(function: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """The same for a generator: the time that its items take."""

    def wrapper(*args: Any) -> Iterator:
        following = timed("read", function(*args).__next__)
        while True:
            try:
                item = following()
            except StopIteration:
                return
            yield item

    return wrapper


def run() -> None:
    """Prepare, and print a table."""
    started_at = time.perf_counter()
    from data_prep import align, encode, encoder, output, workers
    from data_prep.__main__ import main

    files, tokenizer, out = sys.argv[1:]
    encode.read_records = timed_records(encode.read_records)
    encode._compare = timed("compare with the reference", encode._compare)
    encoder.Encoder.encode = timed("encode", encoder.Encoder.encode)
    encode.add_separators = timed("separators", encode.add_separators)
    encode.text_hash = timed("hash", encode.text_hash)
    output.write_split = timed("align: shards", output.write_split)
    output.write_document_map = timed("align: document map", output.write_document_map)
    encode.count_rows = timed("ledger", encode.count_rows)
    encode.encode_unit = timed("write runs, the rest of a unit", encode.encode_unit)
    align.sha256_of = timed("checksums", align.sha256_of)
    workers.encode_unit = encode.encode_unit
    words = ("prep", files, "--tokenizer", tokenizer, "--block-size", "2048", "--num-proc", "1", "--out", out)
    main(list(words))
    whole = time.perf_counter() - started_at
    num_tokens = json.loads((Path(out) / "manifest.json").read_text())["splits"]["train"]["num_tokens"]
    shutil.rmtree(out)
    SECONDS["start-up, proof, plan"] = whole - sum(SECONDS.values())
    print(
        f"\n{Path(files).name}: {num_tokens:,} tokens, {whole:.2f} s in one process\n\n| part | s | % |\n|---|---|---|"
    )
    for part, seconds in sorted(SECONDS.items(), key=lambda item: -item[1]):
        print(f"| {part} | {seconds:.2f} | {100 * seconds / whole:.1f} |")


if __name__ == "__main__":
    run()
