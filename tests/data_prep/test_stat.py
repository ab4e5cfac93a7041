"""`stat` counts what a reader counts by hand, and its page needs nothing but itself."""

import json
import math
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import main, run_here, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep import align, repeats
from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.lengths import Lengths
from data_prep.manifest import load_manifest
from data_prep.stat_text import share
from data_prep.tally import tally_dataset

BLOCK_SIZE = 16
MARKUP = "<script>alert('a corpus may hold markup')</script> & <b>more</b>"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, small_tokenizer):
    """Two sources, some texts more than once, in shards of five blocks."""
    folder = tmp_path_factory.mktemp("stat")
    texts = [f"Document {number} carries letters. " * (1 + number % 7) for number in range(120)]
    one = write_jsonl(folder / "one.jsonl", [*texts, *texts[:30], MARKUP, "", "x" * 1200])
    two = write_jsonl(folder / "two.jsonl", [*texts[:10], *["again"] * 12, "東京 " * 40], score=[1.5] * 23)
    options = ("--tokenizer", small_tokenizer, "--block-size", BLOCK_SIZE, "--val-fraction", 0.2, "--num-proc", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "SHARD_TOKENS", 5 * BLOCK_SIZE)
        run_here("prep", one, two, *options, "--out", folder / "out")
    return folder / "out"


def documents_by_hand(folder, split):
    """(first token, ids) of every document that ends in the blocks, and all tokens of the blocks."""
    blocks, documents = Blocks(folder, split), DocumentMap(folder, split)
    tokens = blocks.token_at(np.arange(blocks.num_tokens))
    found = [documents.document(number) for number in range(len(documents))]
    return [(each, tuple(tokens[each.first_token : each.end_token])) for each in found], tokens


@pytest.mark.parametrize("split", ["train", "validation"])
def test_lengths_borders_and_copies_are_those_counted_by_hand(dataset, split):
    tally = tally_dataset(dataset).splits[split]
    documents, tokens = documents_by_hand(dataset, split)
    lengths = [each.end_token - each.first_token for each, _ in documents]
    assert len(load_manifest(dataset).splits[split].shards) > 3  # and some documents lie in two shards
    assert (tally.tokens.num, tally.tokens.total, tally.tokens.largest) == (len(lengths), sum(lengths), max(lengths))
    assert tally.tokens.quantile(0.5) == sorted(lengths)[math.ceil(len(lengths) / 2) - 1]
    assert tally.num_bytes.total == load_manifest(dataset).splits[split].num_bytes
    begun = [each for each, _ in documents if each.first_token < len(tokens)]
    cut = [each for each in begun if each.first_token // BLOCK_SIZE != (each.end_token - 1) // BLOCK_SIZE]
    assert tally.num_cut == len(cut)
    assert tally.num_long == sum(each.end_token - each.first_token > BLOCK_SIZE for each in begun)
    whole = Counter(ids for each, ids in documents if each.end_token <= len(tokens))
    assert (tally.repeats.num_documents, tally.repeats.num_copies) == (whole.total(), whole.total() - len(whole))
    assert tally.repeats.num_copied_tokens == sum(len(ids) * (num - 1) for ids, num in whole.items())
    number_of = {ids: each.number for each, ids in reversed(documents)}
    for how_often, number in tally.repeats.most:
        assert whole[documents[number][1]] == how_often and number_of[documents[number][1]] == number
    assert [how_often for how_often, _ in tally.repeats.most] == sorted(
        (num for num in whole.values() if num > 1), reverse=True
    )[:5]


def test_sources_and_ids_are_those_counted_by_hand(dataset):
    tally = tally_dataset(dataset)
    tokens = Counter(documents_by_hand(dataset, "train")[1].tolist())
    assert dict(tokens) == {id_: num for id_, num in enumerate(tally.counts.tolist()) if num}
    entropy = -sum(num / tokens.total() * math.log(num / tokens.total()) for num in tokens.values())
    assert tally.entropy == pytest.approx(entropy, rel=1e-12)
    held_out, size = Counter(documents_by_hand(dataset, "validation")[1].tolist()), len(tally.counts)
    nats = -sum(num * math.log((tokens[id_] + 1) / (tokens.total() + size)) for id_, num in held_out.items())
    assert tally.validation_cross_entropy == pytest.approx(nats / held_out.total(), rel=1e-12)
    ledger = load_manifest(dataset).ledger
    assert [source.name for source in tally.sources] == list(ledger)
    for source in tally.sources:
        entry = ledger[source.name]
        parts = [entry[split] for split in ("train", "validation")]
        assert source.tokens.num == sum(part["num_documents"] for part in parts)
        assert source.tokens.total == sum(part["num_tokens"] for part in parts)
        assert source.num_bytes == sum(part["num_bytes"] for part in parts)
    assert tally.num_shared == 0  # the split is by hash: equal texts never lie on both sides


def test_where_documents_are_too_many_copies_are_counted_in_a_part_chosen_by_hash(dataset, capsys, monkeypatch):
    whole = tally_dataset(dataset).splits["train"].repeats
    monkeypatch.setattr(repeats, "MAX_KEPT", whole.num_documents // 3)
    some = tally_dataset(dataset).splits["train"].repeats
    assert some.one_in in (4, 8) and some.num_documents <= whole.num_documents // 3
    assert set(some.most) <= set(repeats_of_all(dataset))  # a text's copies are all kept, or none is
    run_here("stat", dataset, "--html", dataset.parent / "some.html")
    assert f"counted in one text of {some.one_in}, chosen by hash" in capsys.readouterr().out


def repeats_of_all(dataset):
    documents, tokens = documents_by_hand(dataset, "train")
    whole = Counter(ids for each, ids in documents if each.end_token <= len(tokens))
    first = {ids: each.number for each, ids in reversed(documents)}
    return [(num, first[ids]) for ids, num in whole.items() if num > 1]


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_packed_documents_are_counted_as_those_of_one_stream(dataset, tmp_path, small_tokenizer, packing, capsys):
    sources = [dataset.parent / name for name in ("one.jsonl", "two.jsonl")]
    options = ("--tokenizer", small_tokenizer, "--val-fraction", 0.2, "--num-proc", 1)
    run_here("prep", *sources, *options, "--block-size", 1, "--out", tmp_path / "stream")  # which leaves nothing over
    packed = (*options, "--block-size", BLOCK_SIZE, "--packing", packing)
    run_here("prep", *sources, *packed, "--out", tmp_path / "packed")
    stream, tally = tally_dataset(tmp_path / "stream"), tally_dataset(tmp_path / "packed")
    assert np.array_equal(stream.counts, tally.counts)
    for split in ("train", "validation"):
        assert stream.splits[split].repeats == tally.splits[split].repeats
        assert stream.splits[split].tokens.total == tally.splits[split].tokens.total
        info = load_manifest(tmp_path / "packed").splits[split]
        assert (info.num_cut, info.num_long) == (tally.splits[split].num_cut, tally.splits[split].num_long)
    run_here("stat", tmp_path / "packed")
    words = Page((tmp_path / "packed" / "stat.html").read_text(encoding="utf-8")).words
    assert f"train: padding\n{load_manifest(tmp_path / 'packed').splits['train'].num_padding_tokens:,} (" in words
    capsys.readouterr()
    num_blocks = Blocks(tmp_path / "packed", "train").num_blocks
    run_here("inspect", tmp_path / "packed", "--documents", 0, "--show", num_blocks, "--whole")
    shown = capsys.readouterr().out
    assert shown.count("[BOT]again[EOT]\n--- end of document") == 12
    assert shown.count(" of padding") > 9 and "[PAD]" not in shown and "--- goes on in another block" in shown


class Page(HTMLParser):
    """Its words, its elements, and every address that it would load from."""

    def __init__(self, text):
        super().__init__()
        self.words, self.elements, self.addresses = "", Counter(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_everything_and_loads_nothing(dataset, capsys):
    run_here("stat", dataset)
    printed = capsys.readouterr().out
    assert f"pictures: {dataset / 'stat.html'}\n" in printed and len(printed.splitlines()) < 16
    text = (dataset / "stat.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses == [] and page.elements["script"] == 0 and "@import" not in text and "url(" not in text
    assert page.elements["svg"] == 5 and page.elements["rect"] > 20 and page.elements["b"] == 2 * 3  # of captions
    tally, manifest = tally_dataset(dataset), load_manifest(dataset)
    best = int(np.argmax(tally.counts))
    for shown in (
        f"{tally.entropy:.4f} nats per token",
        f"{tally.validation_cross_entropy:.4f} nats per token",
        f"{tally.splits['train'].num_cut:,} ({share(tally.splits['train'].num_cut, tally.splits['train'].tokens.num)})",
        f"{int(tally.counts[best]):,}",
        f"{int((tally.counts == 0).sum())} of {len(tally.counts)} ids are never used",
        "empty1 (0.568 %)",
        f"{tally.splits['train'].repeats.most[0][0]} times in train, first in two/two.jsonl, record 10, 5 bytes,",
        *(source.name for source in tally.sources),
        manifest.fingerprint[:16],
    ):
        assert shown in page.words.replace("\n", ""), shown
    assert "two/two.jsonl, record" in page.words and "Document" in page.words


def test_markup_of_the_corpus_is_text_on_the_page(tmp_path, small_tokenizer):
    source = write_jsonl(tmp_path / f"{'&'}<i>.jsonl", [MARKUP] * 3 + ["</pre></table><img src=x>\x1b[31m\u202e"] * 3)
    options = ("--tokenizer", small_tokenizer, "--block-size", 8, "--val-fraction", 0, "--num-proc", 1)
    run_here("prep", source, *options, "--out", tmp_path / "out")
    run_here("stat", tmp_path / "out", "--html", tmp_path / "deep" / "page.html")
    text = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.elements["script"], page.elements["img"], page.elements["i"]) == (0, 0, 0)
    assert MARKUP in page.words and "</pre></table><img src=x>␛[31m<U+202E>" in page.words
    assert "3 times in train" in page.words and not (tmp_path / "out" / "stat.html").exists()


def test_rules_of_the_ledger_are_shown_by_the_names_that_it_gives_them(tmp_path, small_tokenizer, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", ["some text " * 9] * 20, score=[1, 2, 3, 4, None] * 4)
    options = ("--tokenizer", small_tokenizer, "--block-size", 8, "--val-fraction", 0, "--num-proc", 1)
    run_here("prep", source, *options, "--out", tmp_path / "out", "--buckets", "low=score < 3", "high=score > 3")
    capsys.readouterr()
    run_here("stat", tmp_path / "out" / "low")
    assert "left out of 20 documents read: in high 4 (20 %), in no bucket 4 (20 %), no score 4 (20 %)" in (
        capsys.readouterr().out
    )
    page = Page((tmp_path / "out" / "low" / "stat.html").read_text(encoding="utf-8"))
    assert "no score\n4 (20 %)" in page.words
    # whatever else stands in a ledger: rules that count in several ways, tables of filters, a source that failed
    path = tmp_path / "out" / "low" / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    entry = raw["ledger"]["x"]
    entry["documents"] |= {"near duplicate": 2, "filtered": {"gopher": 1, "c4": {"num_documents": 2, "num_bytes": 700}}}
    entry |= {"filters": {"pii": {"documents_before": 1234, "documents_changed": 5}}, "failed": "the server went away"}
    path.write_text(json.dumps(raw), encoding="utf-8")
    run_here("stat", tmp_path / "out" / "low")
    assert "empty 0" not in (shown := capsys.readouterr().out)
    assert "left out of 20 documents read: gopher 1 (5 %), c4 2 (10 %), near duplicate 2 (10 %)" in shown
    words = Page((tmp_path / "out" / "low" / "stat.html").read_text(encoding="utf-8")).words
    assert "gopher\n1 (5 %)" in words and "x: failed: the server went away" in words
    assert "sourcedocuments beforedocuments changed\n\nxpii1,2345" in words.replace("\n\n\n", "\n\n")


def test_a_tokenizer_that_does_not_give_its_text_back_is_counted_all_the_same(tmp_path, capsys):
    words = {"<unk>": 0, "</s>": 1, "some": 2, "text": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(
        tmp_path / "t"
    )
    source = write_jsonl(tmp_path / "x.jsonl", ["some text and more"] * 9)
    options = ("--tokenizer", tmp_path / "t", "--block-size", 4, "--val-fraction", 0, "--num-proc", 1)
    run_here("prep", source, *options, "--out", tmp_path / "out")
    run_here("stat", tmp_path / "out")
    page = Page((tmp_path / "out" / "stat.html").read_text(encoding="utf-8"))
    assert "Without byte ranges: tokenizer" in page.words and page.elements["svg"] == 3
    capsys.readouterr()
    run_here("inspect", tmp_path / "out", "--documents", 1, "--show", 1)
    shown = capsys.readouterr().out
    assert "neither byte-level BPE nor SentencePiece-BPE" in shown and "some text <unk> <unk>" in shown


def test_a_page_that_cannot_be_written_is_refused_with_the_option(dataset, tmp_path, fails):
    (tmp_path / "file").write_text("")
    message = fails("stat", dataset, "--html", tmp_path / "file" / "page.html")
    assert "cannot be written" in message and "Name another file with --html." in message


def test_a_split_of_nothing_is_no_mistake(tmp_path, small_tokenizer, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", ["some text " * 9])
    options = ("--tokenizer", small_tokenizer, "--block-size", 8, "--val-fraction", 0, "--num-proc", 1)
    run_here("prep", source, *options, "--out", tmp_path / "out")
    assert main(["stat", str(tmp_path / "out")]) == 0
    assert "validation: 0 documents, 0 bytes, 0 tokens, 0 blocks\nleft out of 1" in capsys.readouterr().out


@given(values=npst.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 2**32 - 1)), parts=st.integers(1, 4))
def test_quantiles_are_exact_up_to_1024_and_close_above(values, parts):
    lengths = Lengths()
    for part in np.array_split(values, parts):
        lengths.add(part)
    assert (lengths.num, lengths.largest) == (len(values), values.max())
    assert lengths.total == pytest.approx(values.sum(), rel=1e-9)
    for fraction in (0.01, 0.1, 0.5, 0.9, 0.99, 1):
        exact = int(np.sort(values)[max(1, math.ceil(fraction * len(values))) - 1])
        found = lengths.quantile(fraction)
        assert found == exact if exact < 1024 else abs(found - exact) <= 0.006 * exact
    for per_octave in (2, 4):
        bins = lengths.coarse(per_octave)
        assert sum(num for _, _, num, _ in bins) == len(values)
        assert all(a[1] == pytest.approx(b[0]) for a, b in zip(bins, bins[1:], strict=False))
