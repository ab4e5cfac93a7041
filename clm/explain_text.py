"""An explanation for a terminal or a text file: a table of the batch, then the text with its documents.

A loss colours the background of its token, from nothing (it was expected) over yellow to red. Without colours (NO_COLOR
is set, or this is no terminal) each block names its most surprising tokens in words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from clm.block_text import BlockText
from data_prep.blocks import NO_TARGET
from data_prep.parts import describe_part
from data_prep.sizes import format_table
from data_prep.vocabulary import Vocabulary, show_unseen

if TYPE_CHECKING:
    from clm.explain import Explanation

# Upper borders of the classes of losses, in nats: probabilities of 61, 37, 14, 5, 1.1, 0.25 and 0.03 per cent.
LOSS_BORDERS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
# Backgrounds of the 256-colour palette with black letters, for each class but the first.
_BACKGROUNDS = (230, 229, 222, 216, 210, 203, 196)
_NUM_SURPRISING = 5


def format_explanation(explanation: Explanation, max_rows: int | None = None, colours: bool = False) -> str:
    """The whole report as text.

    Args:
        max_rows: rows of `block_size` tokens to show the text of; None for all.
    """
    width = max(len(name) for name, _ in explanation.facts)
    lines = [explanation.title, *(f"{name:<{width}}  {value}" for name, value in explanation.facts)]
    lines += explanation.notes
    has_losses = any(block.losses is not None for block in explanation.blocks)
    if colours and has_losses:
        lines.append("loss in nats: " + _format_legend())
    lines += ["", *_format_table(explanation, has_losses)]
    rows_left = math.inf if max_rows is None else max_rows
    rows_per_block = (len(explanation.blocks[0].tokens) - 1) // explanation.block_size
    for block in explanation.blocks:
        if rows_left <= 0:
            break
        num_tokens = int(min(rows_left, rows_per_block)) * explanation.block_size
        lines += ["", *_format_block(block, explanation.vocabulary, num_tokens, colours)]
        rows_left -= rows_per_block
    num_rows = explanation.num_blocks * rows_per_block
    if max_rows is not None and max_rows < num_rows:
        lines += ["", f"{num_rows - max_rows:,} more rows are not printed; --max-rows {num_rows} prints all that the "
                      "HTML file holds."]  # fmt: skip
    return "\n".join(lines)


def loss_class(loss: float) -> int:
    """0 (expected) to 7 (a great surprise), by LOSS_BORDERS; NaN is 0."""
    return 0 if math.isnan(loss) else int(np.searchsorted(LOSS_BORDERS, loss, side="right"))


def describe_place(block: BlockText) -> str:
    """Where a block lies, and who sees it in the step at hand."""
    place = f"{block.dataset}:{block.block}, row {block.shard_row:,} of {block.shard_file}"
    if block.seen_as:
        seen = block.seen_as
        place = f"sample {seen['sample']:,}, rank {seen['rank']}, micro-batch {seen['micro_batch']}: {place}"
    num_padding = len(block.tokens) - 1 - block.num_tokens
    return place + (f", {num_padding:,} tokens of padding" if num_padding else "")


def table_of(explanation: Explanation) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of the batch."""
    is_step = bool(explanation.blocks[0].seen_as)
    has_losses = any(block.losses is not None for block in explanation.blocks)
    head = ["sample", "rank", "micro-batch"] if is_step else []
    head += ["block", "shard", "row", "documents"] + (["loss"] if has_losses else [])
    rows = []
    for block in explanation.blocks:
        seen = [f"{value:,}" for value in block.seen_as.values()]
        row = [*seen, f"{block.dataset}:{block.block}", block.shard_file, f"{block.shard_row:,}"]
        row.append(f"{len(block.parts):,}" if block.parts else "-")
        rows.append(row + ([f"{block.mean_loss:.4f}"] if has_losses else []))
    return head, rows


def _format_table(explanation: Explanation, has_losses: bool) -> list[str]:
    head, rows = table_of(explanation)
    lines = format_table([head, *rows], is_text=True)
    left = explanation.num_blocks - len(explanation.blocks)
    num_tokens = sum(len(block.tokens) - 1 for block in explanation.blocks)
    return lines + [f"({left:,} more blocks: a report holds the first {num_tokens:,} tokens)"] * (left > 0)


def _format_block(block: BlockText, vocabulary: Vocabulary, num_tokens: int, colours: bool) -> list[str]:
    lines = [f"=== {describe_place(block)}"]
    if block.losses is not None:
        lines[0] += f", loss {block.mean_loss:.4f}"
        if not colours:
            lines.append(f"most surprising: {_format_surprises(block, vocabulary)}")
    texts = [show_unseen(text) for text in vocabulary.texts(block.tokens[: block.num_tokens])]
    first = block.first_token
    for part in block.parts:
        begin, end = part.first_token - first, min(part.end_token - first, num_tokens)
        if begin >= num_tokens:
            break
        begun = " (begun earlier)" if part.piece.is_begun else ""
        lines.append(f"--- {describe_part(part)}{begun}")
        lines.append(_colour(texts[begin:end], block, begin, vocabulary) if colours else "".join(texts[begin:end]))
        is_end = not part.piece.goes_on and end == part.end_token - first
        lines.append("--- end of document" if is_end else "--- goes on")
    if not block.parts:
        shown = texts[:num_tokens]
        lines.append(_colour(shown, block, 0, vocabulary) if colours else "".join(shown))
    return lines


def _format_surprises(block: BlockText, vocabulary: Vocabulary) -> str:
    order = np.argsort(-np.nan_to_num(block.losses, nan=-1.0), kind="stable")[:_NUM_SURPRISING]
    return ", ".join(
        f"{show_unseen(vocabulary.show(int(block.tokens[i + 1])))} {block.losses[i]:.1f}"
        for i in order
        if block.tokens[i + 1] != NO_TARGET
    )


def _colour(texts: list[str], block: BlockText, begin: int, vocabulary: Vocabulary) -> str:
    out = []
    for i, text in enumerate(texts, start=begin):
        number = loss_class(block.loss_of(i))
        style = f"38;5;16;48;5;{_BACKGROUNDS[number - 1]}" if number else ""
        if vocabulary.is_control(int(block.tokens[i])):
            style = f"{style};3" if style else "2"
        if number:
            text = text.replace("\n", "↵\n")  # an empty line has no room for a colour
        # a background that spans a line's end would colour the rest of the line
        painted = "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
        out.append(painted if style else text)
    return "".join(out)


def _format_legend() -> str:
    names = loss_names()
    shown = [names[0]]
    shown += [f"\x1b[38;5;16;48;5;{b}m {name} \x1b[0m" for b, name in zip(_BACKGROUNDS, names[1:], strict=True)]
    return " ".join(shown)


def loss_names() -> list[str]:
    """The classes of losses in words."""
    borders = [f"{border:g}" for border in LOSS_BORDERS]
    between = [f"{a}-{b}" for a, b in zip(borders, borders[1:], strict=False)]
    return [f"under {borders[0]}", *between, f"over {borders[-1]}"]
