"""Bits per byte of a run's model beside general compressors on the same held-out text: an honest yardstick.

In: runs/<name> and its prepared datasets. Out: one row per method: the model (from metrics.jsonl), zlib -9 and lzma -9e
on the held-out text alone, and both again after seeing training text (zlib as much as its window holds, lzma 8 MB),
since the model saw it too.
"""

from __future__ import annotations

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clm.run_folder import find_run, last_evaluation, read_metrics, read_recipe
from data_prep.blocks import Blocks
from data_prep.errors import UserError

PRIMING_BYTES = 8_000_000  # lzma's dictionary at preset 9 holds 64 MiB; more would only take longer
MOST_TOKENS = 4_000_000  # of held-out text; lzma takes about a second for 3 MB
ZLIB_WINDOW = 2**15
_PRESET = 9 | lzma.PRESET_EXTREME


@dataclass(frozen=True)
class Row:
    """One line of the table; `bits_per_byte` is lower for what predicts the text better."""

    method: str
    bits_per_byte: float | None


def held_out_text(folder: Path, num_tokens: int, tokenizer: Any) -> bytes:
    """The text of the first `num_tokens` tokens of a validation split, control tokens removed, as UTF-8."""
    blocks = Blocks(folder, "validation")
    pieces: list[bytes] = []
    left = num_tokens
    for shard in range(len(blocks.shard_starts) - 1):
        end = min(left, len(blocks.shard_tokens(shard)))
        pieces.append(_decode(blocks, shard, 0, end, tokenizer))
        left -= end
        if left <= 0:
            break
    return b"".join(pieces)


def training_text(folder: Path, num_bytes: int, tokenizer: Any) -> bytes:
    """The end of the training text: at most `num_bytes`, all of it where it is shorter."""
    blocks = Blocks(folder, "train")
    pieces: list[bytes] = []
    left = -(
        -num_bytes // 3
    )  # tokens; one of text is longer than 3 bytes as a rule, and the table names the real amount
    for shard in reversed(range(len(blocks.shard_starts) - 1)):
        end = len(blocks.shard_tokens(shard))
        pieces.insert(0, _decode(blocks, shard, max(0, end - left), end, tokenizer))
        left -= end
        if left <= 0:
            break
    return b"".join(pieces)[-num_bytes:]


def compressor_rows(held_out: bytes, training: bytes) -> list[Row]:
    """Bits per byte of zlib and lzma on `held_out`, alone and after `training`."""
    with ThreadPoolExecutor() as pool:  # lzma and zlib release the GIL
        together = pool.submit(_lzma_size, training + held_out)
        before = pool.submit(_lzma_size, training)
        cold = pool.submit(_lzma_size, held_out)
        sizes = {
            "zlib -9": _zlib_size(held_out),
            "lzma -9e": cold.result(),
            f"zlib -9 after {_amount(min(len(training), ZLIB_WINDOW))} of training text": _zlib_size(
                held_out, training
            ),
            f"lzma -9e after {_amount(len(training))} of training text": together.result() - before.result(),
        }
    return [Row(method, 8 * size / len(held_out)) for method, size in sizes.items()]


def describe_yardstick(run: Path) -> str:
    """The table as text, one per validation set, the best method first."""
    from transformers import AutoTokenizer

    recipe, evaluation = read_recipe(run), last_evaluation(read_metrics(run))
    sets = recipe["resolved"].get("validation") or []
    if evaluation is None or not sets:
        raise UserError(
            f"{run / 'metrics.jsonl'}: has no evaluation, so there is no text to measure on. "
            "Set data.validation and train again."
        )
    trained_on = [dataset["folder"] for dataset in recipe["resolved"].get("datasets") or []]
    parts = []
    for item in sets:
        folder = Path(item["folder"])
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        held_out = held_out_text(folder, min(item["num_tokens"], MOST_TOKENS), tokenizer)
        # The compressors are primed with this set's own training text where there is one, the likest there can be.
        source = folder if str(folder) in trained_on or not trained_on else Path(trained_on[0])
        key = f"eval_{item['name']}_bits_per_byte" if len(sets) > 1 else "eval_bits_per_byte"
        model = Row("this model", evaluation.get(key))
        rows = [model, *compressor_rows(held_out, training_text(source, PRIMING_BYTES, tokenizer))]
        parts.append(_format(item["name"], held_out, item["num_tokens"], rows))
    return "\n\n".join(parts)


def print_yardstick(name: str) -> None:
    """`python -m clm yardstick`: print the table of a run."""
    print(describe_yardstick(find_run(name)))


def _decode(blocks: Blocks, shard: int, first: int, end: int, tokenizer: Any) -> bytes:
    """The text of a shard's tokens [first, end), without padding."""
    tokens = blocks.shard_tokens(shard)[first:end]
    if blocks.is_padded:
        tokens = tokens[blocks.is_text(int(blocks.shard_starts[shard]) * blocks.block_size + np.arange(first, end))]
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()


# Bare streams: headers and checks of the .xz and zlib containers would count against them on a short text.


def _lzma_size(text: bytes) -> int:
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": _PRESET}]))


def _zlib_size(text: bytes, training: bytes = b"") -> int:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=training[-ZLIB_WINDOW:])
    return len(compressor.compress(text)) + len(compressor.flush())


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def _format(name: str, held_out: bytes, num_tokens: int, rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda row: float("inf") if row.bits_per_byte is None else row.bits_per_byte)
    width = max(len(row.method) for row in rows)
    lines = [
        f"bits per byte on the held-out text of {name} ({len(held_out):,} bytes, {num_tokens:,} tokens), best first:"
    ]
    for row in rows:
        value = "not measured" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
        lines.append(f"  {row.method:<{width}}  {value}")
    lines.append("  (the model's includes the document ends, which the compressors need not predict)")
    return "\n".join(lines)
