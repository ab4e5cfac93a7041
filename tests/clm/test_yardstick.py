import itertools
import json
import lzma
import random
import re
import zlib

import pytest
from transformers import AutoTokenizer

from clm.yardstick import compressor_rows, describe_yardstick, held_out_text, training_text
from data_prep.documents import documents_between


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")


def test_the_held_out_text_is_the_documents_without_control_tokens(prepared, small_run, tokenizer):
    num_tokens = json.loads((small_run / "metrics.jsonl").read_text().splitlines()[-2])["eval_num_tokens"] + 1
    text = held_out_text(prepared.folder, num_tokens, tokenizer)
    chapters = [path.read_bytes() for path in prepared.corpus.glob("*.txt")]
    pages = [json.loads(line)["text"].encode() for line in (prepared.corpus / "pages.jsonl").read_bytes().splitlines()]
    documents = documents_between(prepared.folder, "validation", 0, num_tokens)
    ends = list(itertools.accumulate(document.num_bytes for document in documents))
    assert len(ends) >= 10 and ends[-2] < len(text) <= ends[-1]  # the last block cuts a document, or ends with one
    for start, end in zip([0, *ends], ends[:-1], strict=False):
        assert text[start:end] in [*chapters, *pages]
    shorter = held_out_text(prepared.folder, 50, tokenizer)
    assert 50 <= len(shorter) < 300 and text.startswith(shorter)


def test_training_text_is_its_end_and_never_longer_than_asked(prepared, tokenizer):
    whole = training_text(prepared.folder, 10**6, tokenizer)
    end = training_text(prepared.folder, 1000, tokenizer)
    assert len(whole) > 100_000 and 500 < len(end) <= 1000 and whole.endswith(end)


def test_compressors_get_the_same_bytes_and_priming_helps_them():
    words = [f"{i * i % 9973}" for i in range(2000)]
    draw = random.Random(1)
    training = " ".join(draw.choices(words, k=20_000)).encode()[:88_000]
    held_out = " ".join(draw.choices(words, k=2000)).encode()
    rows = {row.method: row.bits_per_byte for row in compressor_rows(held_out, training)}
    sizes = [round(value * len(held_out) / 8) for value in rows.values()]
    zlib_cold, lzma_cold, zlib_primed, lzma_primed = sizes
    assert zlib_cold == len(zlib.compress(held_out, 9)) - 6  # the container's header and checksum
    assert 0 < len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) - lzma_cold < 80
    assert zlib_primed < zlib_cold and lzma_primed < lzma_cold
    assert "zlib -9 after 33 kB of training text" in rows and "lzma -9e after 88 kB of training text" in rows


def test_the_table_is_sorted_and_an_untrained_model_stands_last(small_run):
    table = describe_yardstick(small_run)
    values = [float(value) for value in re.findall(r"^  .*  (\d+\.\d{3})$", table, re.MULTILINE)]
    assert len(values) == 5 and values == sorted(values)
    assert "this model" in table.splitlines()[5]
