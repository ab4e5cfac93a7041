"""An explanation as one HTML file that needs nothing else: no network, no script or style from elsewhere.

In: an explanation. Out: a page (clm/explain.html is its template) with the facts, a histogram of the losses, the table
of the batch and the text, each token coloured by its loss. Text of a corpus is never markup: jinja2 escapes what the
template shows, and `_token_markup` escapes the tokens.
"""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clm.block_text import BlockText, mean
from clm.explain_text import describe_place, loss_class, loss_names, table_of
from data_prep.blocks import NO_TARGET
from data_prep.parts import describe_part
from data_prep.vocabulary import Vocabulary, show_unseen

if TYPE_CHECKING:
    from clm.explain import Explanation

# How opaque the red is behind a token of loss class 1 ... 7: text stays readable on the last one, light and dark.
_ALPHAS = (0.06, 0.13, 0.22, 0.34, 0.5, 0.68, 0.85)
_BIN_NATS, _MAX_BINS = 0.25, 64  # of the histogram; its last bin holds all that is above
_WIDTH, _HEIGHT = 720, 120  # of its bars, in pixels


def write_html(explanation: Explanation, path: Path) -> None:
    """Write the page, by rename: a browser never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(render(explanation), encoding="utf-8")
    os.replace(temporary, path)


def render(explanation: Explanation) -> str:
    """The page."""
    from jinja2 import Environment
    from markupsafe import Markup

    template = Path(__file__).with_name("explain.html").read_text(encoding="utf-8")
    head, rows = table_of(explanation)
    losses = [block.losses for block in explanation.blocks if block.losses is not None]
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=explanation.title,
            facts=explanation.facts,
            notes=explanation.notes,
            alphas=_ALPHAS,
            loss_names=loss_names(),
            histogram=Markup(draw_histogram(np.concatenate(losses))) if losses else "",
            head=head,
            rows=rows,
            num_left=explanation.num_blocks - len(explanation.blocks),
            num_tokens=sum(len(block.tokens) - 1 for block in explanation.blocks),
            block_size=explanation.block_size,
            blocks=[
                _block(block, explanation.vocabulary, explanation.block_size, Markup) for block in explanation.blocks
            ],
        )
    )


def draw_histogram(losses: np.ndarray) -> str:
    """An SVG of how many tokens have which loss, in bins of a quarter of a nat."""
    losses = losses[~np.isnan(losses)]
    if not len(losses):
        return ""
    num_bins = min(_MAX_BINS, int(losses.max() / _BIN_NATS) + 1)
    counts = np.bincount(np.minimum(losses / _BIN_NATS, num_bins - 1).astype(int), minlength=num_bins)
    step = _WIDTH / num_bins
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - count / counts.max()):.1f}" width="{step - 1:.1f}" '
        f'height="{_HEIGHT * count / counts.max():.1f}"><title>{i * _BIN_NATS:g} nats: {count:,} tokens</title></rect>'
        for i, count in enumerate(counts.tolist())
    )
    nats = range(0, math.ceil(num_bins * _BIN_NATS), max(1, round(num_bins * _BIN_NATS / 10)))
    labels = "".join(f'<text x="{n / _BIN_NATS * step:.1f}" y="{_HEIGHT + 14}">{n}</text>' for n in nats)
    at = min(mean(losses) / _BIN_NATS, num_bins) * step
    line = f'<path d="M{at:.1f} 0V{_HEIGHT}" stroke="currentColor" stroke-dasharray="4 3" fill="none"/>'
    box = f"0 0 {_WIDTH} {_HEIGHT + 18}"
    return (
        f'<svg viewBox="{box}" width="{_WIDTH}" role="img" aria-label="histogram of the losses">'
        f'<g fill="#cd4444">{bars}</g>{line}<g fill="currentColor" font-size="11">{labels}</g></svg>'
    )


def _block(block: BlockText, vocabulary: Vocabulary, block_size: int, markup: type) -> dict[str, Any]:
    """A block as the template needs it."""
    num_tokens = block.num_tokens
    has_next = block.losses is not None and block.tokens[-1] != NO_TARGET
    ids = block.tokens[: num_tokens + has_next].tolist()
    tokens = [
        _token_markup(text, token, block.loss_of(i), vocabulary, "" if i < num_tokens else "after")
        for i, (text, token) in enumerate(zip(vocabulary.texts(np.array(ids)), ids, strict=True))
    ]
    for row in range(block_size, num_tokens, block_size):
        tokens[row] = f'<u title="row {row // block_size}"></u>{tokens[row]}'
    if has_next:
        tokens[num_tokens - 1] += tokens.pop()
    first = block.first_token
    documents = [
        {
            "source": describe_part(part),
            "is_begun": part.piece.is_begun,
            "goes_on": part.piece.goes_on,
            "tokens": markup("".join(tokens[part.first_token - first : part.end_token - first])),
        }
        for part in block.parts
    ]
    losses = [block.loss_of(i) for i in range(len(ids))] if block.losses is not None else []
    return {
        "title": describe_place(block) + ("" if block.losses is None else f", loss {block.mean_loss:.4f}"),
        "ids": " ".join(map(str, ids)),
        "losses": " ".join("-" if math.isnan(loss) else f"{loss:.2f}" for loss in losses),
        "documents": documents or [{"source": "", "tokens": markup("".join(tokens))}],
    }


def _token_markup(text: str, token: int, loss: float, vocabulary: Vocabulary, kind: str) -> str:
    number = loss_class(loss)
    classes = [f"k{number}"] * (number > 0) + [kind] * bool(kind)
    if vocabulary.is_control(token):
        classes.append("c")
    elif "\n" in text and text.isspace():
        classes.append("n")  # white space has no room for a colour
    attributes = f' class="{" ".join(classes)}"' if classes else ""
    if not text:
        attributes += f' data-bytes="{vocabulary.table[token].hex(" ")}"'
    return f"<i{attributes}>{escape(show_unseen(text))}</i>"
