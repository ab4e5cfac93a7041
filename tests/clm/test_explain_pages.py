"""The two shapes of an explanation: text for a terminal, and one HTML file."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from clm.explain import explain_step, open_text
from clm.explain_html import draw_histogram, render
from clm.explain_text import format_explanation, loss_class
from data_prep.vocabulary import has_colours


class Page(HTMLParser):
    """What a browser would make of a page: tags, and the text inside <pre>."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.pre = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.pre += data


# --- text ---


STEP_2 = """\
r, step 2
step    2 of 2: will be seen, the run is at step 1
tokens  32 in it, 32 before it
layout  1 process x 1 micro-batch x 2 rows of 16 tokens, as at the last start of the run

sample  rank  micro-batch  block  shard                   row  documents
1       0     0            two:1  train/data-00000.arrow  1    2

=== sample 1, rank 0, micro-batch 0: two:1, row 1 of train/data-00000.arrow
--- two/two.jsonl, record 0, bytes 33-42 of 42, url https://example.org/0?a=1&b=<i> (begun earlier)
& naïve
[EOT]
--- end of document
--- two/two.jsonl, record 1, bytes 0-77 of 148, url https://example.org/1?a=1&b=<i>
[BOT]The river carries seven stones 🙂.
The river carries seven stones 🙂.
The
--- goes on"""


def test_the_text_of_a_step_can_be_checked_by_eye(started, two_documents):
    _, overrides = two_documents
    assert format_explanation(explain_step(open_text(started(*overrides, newest=1)), 2, None)) == STEP_2
    docs = Path(__file__).parents[2] / "docs/explain.md"
    assert f"```text\n{STEP_2}\n```" in docs.read_text(encoding="utf-8")


def vocabulary_texts(explanation):
    """The text of each token of the first block."""
    return explanation.vocabulary.texts(explanation.blocks[0].tokens[:-1])


def test_losses_colour_the_background_and_their_class_is_in_the_legend(started, two_documents):
    folder, overrides = two_documents
    explanation = explain_step(open_text(started(*overrides)), 1, None)
    (block,) = explanation.blocks
    block.losses = np.full(32, 0.1, np.float32)
    block.losses[:3] = np.nan, 9.0, 2.5
    plain = format_explanation(explanation)
    assert "\x1b" not in plain and "0.4645" in plain  # (29 x 0.1 + 9 + 2.5) / 31
    assert "most surprising: " in plain and " 9.0, " in plain
    assert "␛[31m " in plain, "an escape sequence of the corpus is shown, never obeyed"
    coloured = format_explanation(explanation, colours=True)
    shown = vocabulary_texts(explanation)
    assert f"{shown[1]}\x1b[38;5;16;48;5;196m{shown[2]}\x1b[0m\x1b[38;5;16;48;5;222m{shown[3]}\x1b[0m" in coloured
    assert "\x1b[38;5;16;48;5;196m over 8 \x1b[0m" in coloured
    assert [loss_class(loss) for loss in (0.49, 0.5, 7.9, 8, float("nan"))] == [0, 1, 6, 7, 0]


def test_colours_only_where_they_are_wanted(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colours(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Terminal())


# --- HTML ---


@pytest.mark.parametrize("with_losses", [True, False])
def test_the_page_is_one_file_that_holds_the_text_and_no_markup_of_the_corpus(started, two_documents, with_losses):
    _, overrides = two_documents
    explanation = explain_step(open_text(started(*overrides)), 1, None)
    for block in explanation.blocks:
        block.losses = np.linspace(0, 12, 32, dtype=np.float32) if with_losses else None
    html = render(explanation)
    page = Page(html)
    assert page.tags.count("script") == 1, "the page's own"
    following = explanation.vocabulary.texts(explanation.blocks[0].tokens)[-1] if with_losses else ""
    assert page.pre == "[BOT]<script>alert('x')</script>␛[31m " + following
    assert not [value for name, value in page.attributes if name == "src"]
    links = [value for name, value in page.attributes if name == "href"]
    assert links and all(link.startswith("#") for link in links)
    assert "url(" not in html and "@import" not in html and "amp;b=&lt;i&gt;" in html
    # with losses also the token that the block's last position predicts; a bar between the rows
    assert (
        page.tags.count("i") == 32 + with_losses and page.tags.count("u") == 1 and ("svg" in page.tags) == with_losses
    )
    (ids,) = [value.split() for name, value in page.attributes if name == "data-ids"]
    assert list(map(int, ids)) == explanation.blocks[0].tokens[: 32 + with_losses].tolist()
    losses = [value.split() for name, value in page.attributes if name == "data-losses"]
    assert [(len(each), each[0], each[1], each[-1]) for each in losses] == [(33, "-", "0.00", "12.00")] * with_losses


def test_the_pages_text_is_the_decoded_block(started):
    explanation = explain_step(open_text(started()), 1, None)
    assert Page(render(explanation)).pre == "".join(
        "".join(explanation.vocabulary.texts(block.tokens[:-1])) for block in explanation.blocks
    )


def test_a_histogram_counts_every_loss():
    svg = draw_histogram(np.array([0.1, 0.2, 3.0, 50.0, np.nan], dtype=np.float32))
    counts = [int(n) for n in re.findall(r"nats: (\d+) tokens", svg)]
    assert sum(counts) == 4 and counts[0] == 2 and counts[12] == 1 and counts[-1] == 1
    assert draw_histogram(np.array([np.nan], dtype=np.float32)) == ""


def test_a_report_states_how_much_of_a_large_batch_it_holds(started, monkeypatch):
    monkeypatch.setattr("clm.explain.MAX_TOKENS", 200)
    explanation = explain_step(open_text(started()), 1, None)
    assert (len(explanation.blocks), explanation.num_blocks) == (3, 8)
    assert "(5 more blocks: a report holds the first 192 tokens)" in format_explanation(explanation)
    assert "5 more blocks of the batch are not in this file" in render(explanation)
    assert "15 more rows are not printed" in format_explanation(explanation, max_rows=1)


def test_without_documents_the_text_is_shown_and_a_sentence_says_why_not_more(started, two_documents):
    folder, overrides = two_documents
    run = started(*overrides)
    shutil.rmtree(folder / "documents")
    explanation = explain_step(open_text(run), 1, None)
    assert "documents/train.arrow is missing or damaged" in explanation.notes[0]
    assert "[BOT]<script>" in format_explanation(explanation) and "[BOT]<script>" in Page(render(explanation)).pre
