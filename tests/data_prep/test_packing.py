"""Packings: every token of every document lies in one place, which is found again; only the rest is padding."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import content_of, run_here, write_jsonl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import stop_at_every_rename

from data_prep.blocks import Blocks
from data_prep.documents import DocumentMap
from data_prep.manifest import load_manifest
from data_prep.packing import BEST_FIT, PAD, best_fit, cut, iter_windows, pack
from data_prep.tokenizer_folder import load_backend

PADDED = (BEST_FIT, PAD)
WORDS = ("river", "letters", "map", "東京", "naïve", "of", "[EOT]", "[PAD]", "x" * 30, "🙂")


@pytest.fixture
def small_windows(monkeypatch):
    """Windows and shards of some hundred tokens: a small corpus has several of both, with other borders."""
    monkeypatch.setattr("data_prep.packing.WINDOW_TOKENS", 200)
    monkeypatch.setattr("data_prep.packing.MIN_WINDOW_BLOCKS", 2)
    monkeypatch.setattr("data_prep.align.SHARD_TOKENS", 512)


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as the textbook has it; the room left in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [(room, number) for number, room in enumerate(rooms) if room >= length]
        if not enough:
            rooms.append(capacity)
        rooms[min(enough)[1] if enough else -1] -= length
    return sorted(rooms)


@given(data=st.data(), capacity=st.integers(1, 60))
def test_best_fit_is_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=lengths).astype(int) if lengths else np.empty(0, int)
    assert sorted((capacity - filled).tolist()) == one_by_one(lengths, capacity)


@pytest.mark.parametrize("packing", PADDED)
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), block_size=st.integers(1, 20))
@example(lengths=[3, 18, 5], block_size=8)
def test_the_pieces_are_all_tokens_once_and_fit(packing, lengths, block_size):
    packed = pack(np.array(lengths), block_size, packing)
    order = np.argsort(packed.first)
    assert np.array_equal(packed.first[order], np.cumsum(packed.length[order]) - packed.length[order])
    assert packed.length.sum() == sum(lengths)
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, packed.first, side="right")
    assert np.array_equal(document, np.searchsorted(ends, packed.first + packed.length - 1, side="right"))
    for block in range(packed.block[-1] + 1):
        here = packed.block == block
        assert np.array_equal(packed.offset[here], np.cumsum(packed.length[here]) - packed.length[here])
        assert packed.length[here].sum() == packed.block_lengths[block] <= block_size
        assert (np.diff(packed.first[here]) > 0).all(), "in a block the documents keep their order"
    num_pieces = np.bincount(document)
    assert np.array_equal(num_pieces, -(-np.array(lengths) // block_size)), "only what is too long is cut"
    assert len(packed.block_lengths) <= num_pieces.sum()
    if (lengths, block_size) == ([3, 18, 5], 8):  # the example of the module's docstring
        assert packed.block_lengths.tolist() == ([8, 8, 8, 2] if packing == BEST_FIT else [3, 8, 8, 2, 5])


@given(lengths=st.lists(st.integers(1, 70), max_size=60), portion=st.integers(1, 13))
def test_windows_depend_on_the_documents_only(lengths, portion):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.packing.WINDOW_TOKENS", 50)
        patch.setattr("data_prep.packing.MIN_WINDOW_BLOCKS", 1)
        all_lengths = np.array(lengths, dtype=np.uint32)
        at_once = [window.tolist() for window in iter_windows([all_lengths], 8)]
        portions = [all_lengths[i : i + portion] for i in range(0, len(lengths), portion)]
        assert [window.tolist() for window in iter_windows(portions, 8)] == at_once
        assert sum(at_once, []) == lengths
        starts, first = [], 0
        for window in at_once:
            starts.append({(first + before) // 50 for before in np.cumsum([0, *window[:-1]])})
            first += sum(window)
        assert all(len(each) == 1 for each in starts) and len(set().union(*starts)) == len(at_once)


DOCUMENTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), max_size=20)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=DOCUMENTS, block_size=st.integers(1, 40), fraction=st.sampled_from([0, 0.4]))
def test_every_document_is_recovered_from_the_blocks(small_tokenizer, small_windows, texts, block_size, fraction):
    texts = [*texts, "so that there is always one block to train on"]
    backend, waste = load_backend(small_tokenizer), {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "x.jsonl", texts)
        for packing in PADDED:
            out = Path(folder) / packing
            options = ("--tokenizer", small_tokenizer, "--block-size", block_size, "--val-fraction", fraction)
            run_here("prep", source, *options, "--packing", packing, "--out", out, "--num-proc", 1)
            run_here("check", out)
            manifest = load_manifest(out)
            found = [check_places(Blocks(out, split), DocumentMap(out, split), backend) for split in manifest.splits]
            assert sorted(sum(found, [])) == sorted(text for text in texts if text)
            waste[packing] = [split.num_padding_tokens for split in manifest.splits.values()]
            for split in manifest.splits.values():
                assert split.num_blocks * block_size == split.num_tokens + split.num_padding_tokens
                assert split.remainder_tokens == 0
    assert all(a <= b for a, b in zip(waste[BEST_FIT], waste[PAD], strict=True))


def check_places(blocks: Blocks, documents: DocumentMap, backend) -> list[str]:
    """The documents of a split, read by the map; each position is in one of them or in padding, both ways."""
    owner = np.full(blocks.num_tokens, -1)
    texts = []
    for number in range(len(documents)):
        document = documents.document(number)
        ranges = documents.ranges(document.first_token, document.end_token)
        positions = np.concatenate([np.arange(*each) for each in ranges])
        assert (owner[positions] == -1).all()
        owner[positions] = number
        tokens = blocks.token_at(positions).tolist()
        assert (tokens[0], tokens[-1]) == (0, 1)  # [BOT] ... [EOT]
        texts.append(backend.decode(tokens[1:-1], skip_special_tokens=False))
        if len(tokens) <= blocks.block_size:
            assert len(ranges) == 1, "a document that fits is whole"
        offset = 0
        for first, end in ranges:
            (piece,) = documents.pieces(first, end)
            assert (piece.document, piece.offset) == (document, offset)
            assert (piece.is_begun, piece.goes_on) == (offset > 0, offset + end - first < len(tokens))
            assert documents.place_of(first) == document.first_token + offset
            offset += end - first
        assert offset == len(tokens) == document.end_token - document.first_token
    if blocks.num_blocks:
        assert np.array_equal(owner >= 0, blocks.is_text(np.arange(blocks.num_tokens)))
        read = blocks.read(np.arange(blocks.num_blocks))
        assert np.array_equal(read[:, :-1].reshape(-1) == -100, owner == -1)
        assert (read[:, -1] == -100).all()
        inside = list(documents.pieces(0, blocks.num_tokens))
        assert sum(piece.end_token - piece.first_token for piece in inside) == (owner >= 0).sum()
    return texts


@pytest.fixture
def corpus(tmp_path):
    """Six files of records, so six units."""
    rng = random.Random(3)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(6):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(15)]
        write_jsonl(folder / f"{number:02d}.jsonl", texts, score=[rng.randint(0, 5) for _ in texts])
    return folder


def arguments(corpus: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 32, "--val-fraction", 0.1, "--packing", BEST_FIT)
    return [str(each) for each in ("prep", corpus, *fixed, "--out", out, *more)]


def test_one_and_three_workers_give_the_same_bytes(tmp_path, corpus, small_tokenizer, small_windows):
    outs = [tmp_path / str(num_proc) / "out" for num_proc in (1, 3)]
    for num_proc, out in zip((1, 3), outs, strict=True):
        run_here(*arguments(corpus, small_tokenizer, out, "--num-proc", num_proc))
    one, three = map(content_of, outs)
    assert one == three
    assert len([name for name in one if name.startswith("train/data-")]) > 10


@pytest.mark.slow
def test_a_stop_at_every_rename_continues_to_the_same_bytes(
    tmp_path, corpus, small_tokenizer, small_windows, monkeypatch
):
    for path in sorted(corpus.iterdir())[1:]:
        path.unlink()
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "reference" / "out", "--num-proc", 1))
    expected = content_of(tmp_path / "reference" / "out")

    def command(out: Path) -> list[str]:
        return arguments(corpus, small_tokenizer, out, "--num-proc", 1)

    assert stop_at_every_rename(command, tmp_path, expected, monkeypatch) > 10


@pytest.mark.slow
def test_a_killed_prep_continues_to_the_same_bytes(tmp_path, corpus, small_tokenizer):
    out, reference = tmp_path / "a" / "out", tmp_path / "b" / "out"
    run_here(*arguments(corpus, small_tokenizer, reference, "--num-proc", 1))
    command = [sys.executable, "-m", "data_prep", *arguments(corpus, small_tokenizer, out, "--num-proc", 2)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rng = random.Random(int(os.environ["KILL_SEED"]))
    waits = [rng.uniform(0.2, 2.0) for _ in range(4)]
    for wait_s in waits:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"waits {waits}: {done.stderr}"
    assert content_of(out) == content_of(reference), f"waits {waits}"


def test_buckets_are_packed_each_for_itself(tmp_path, corpus, small_tokenizer, small_windows):
    out = tmp_path / "out"
    run_here(*arguments(corpus, small_tokenizer, out, "--buckets", "low=score < 3", "high=score >= 3"))
    rows = [json.loads(line) for path in sorted(corpus.iterdir()) for line in path.read_text().splitlines()]
    backend = load_backend(small_tokenizer)
    for bucket, is_high in (("low", False), ("high", True)):
        run_here("check", out / bucket)
        found = [
            check_places(Blocks(out / bucket, s), DocumentMap(out / bucket, s), backend)
            for s in ("train", "validation")
        ]
        assert sorted(sum(found, [])) == sorted(row["text"] for row in rows if (row["score"] >= 3) == is_high)


def test_cut_gives_whole_blocks_and_a_rest():
    first, length = cut(np.array([3, 18, 8]), 8)
    assert (first.tolist(), length.tolist()) == ([0, 3, 11, 19, 21], [3, 8, 8, 2, 8])
