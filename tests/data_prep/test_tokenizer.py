"""Training a tokenizer, and what any tokenizer must do here."""

import json

import numpy as np
import pytest
from conftest import WORDS, read_documents, run_here, write_jsonl
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.blocks import Blocks
from data_prep.encoder import Encoder, add_separators
from data_prep.manifest import load_manifest
from data_prep.token_bytes import token_byte_lengths
from data_prep.tokenizer_folder import PROBES, describe_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_jsonl(folder / "corpus.jsonl", [f"{WORDS}{number}" for number in range(300)])


def test_train_tokenizer_gives_the_exact_size_and_both_loaders_agree(tmp_path, corpus):
    names = ("--bos-token", "<s>", "--eos-token", "</s>", "--pad-token", "<pad>", "--unk-token", "<unk>")
    for out in ("a", "b"):
        run_here("train-tokenizer", corpus, "--vocab-size", 333, "--out", tmp_path / out, *names)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    loaded, direct = (
        AutoTokenizer.from_pretrained(tmp_path / "a"),
        Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json")),
    )
    assert len(loaded) == 333 == direct.get_vocab_size(with_added_tokens=True)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<s>", "</s>", "<pad>", "<unk>")
    for text in PROBES:
        ids = loaded(text)["input_ids"]
        assert ids == direct.encode(text).ids
        assert ids[0] == loaded.bos_token_id
    assert loaded("x")["input_ids"][-1] != loaded.eos_token_id  # the end of a document is preparation's to write


def test_every_text_comes_back_and_is_never_unknown(small_tokenizer):
    loaded = AutoTokenizer.from_pretrained(small_tokenizer)
    for text in ("\0\x01\x7f", "🙂\u200d e\u0301 日本語", "".join(map(chr, range(0x20, 0x3000, 7))), " \r\n\t  "):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert loaded.decode(ids) == text and loaded.unk_token_id not in ids


def test_a_vocabulary_the_text_cannot_fill_says_how_far_it_got(tmp_path, fails, corpus):
    message = fails("train-tokenizer", corpus, "--vocab-size", 20_000, "--out", tmp_path / "out")
    reached = int(message.split("yields only ")[1].split()[0].replace(",", ""))
    assert not (tmp_path / "out").exists()
    run_here("train-tokenizer", corpus, "--vocab-size", reached, "--out", tmp_path / "out")
    assert "exists already and is not overwritten" in fails(
        "train-tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "out"
    )


def test_control_tokens_must_differ(tmp_path, fails, corpus):
    message = fails("train-tokenizer", corpus, "--vocab-size", 300, "--out", tmp_path / "out", "--pad-token", "[EOT]")
    assert "must be four different words" in message


def test_the_sample_keeps_to_its_budget(tmp_path, small_tokenizer):
    texts = ["aaaa bbbb " * 50, "cccc dddd " * 50, "zzzz yyyy " * 5000]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    command = ("train-tokenizer", source, "--vocab-size", 264, "--sample-bytes", 900, "--out", tmp_path / "out")
    run_here(*command)
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert "zz" not in vocabulary and {"aa", "bb"} & set(vocabulary)


def test_control_tokens_in_text_stay_text(small_tokenizer):
    info = describe_tokenizer(small_tokenizer, None)
    encoder = Encoder(small_tokenizer, info, is_fast=False)
    text = "a [EOT] b [BOT][PAD] [UNK]"
    ids, lengths = encoder.encode([text, "x"])
    assert not set(ids.tolist()) & {0, 1, 2, 3} and lengths.sum() == len(ids)
    assert AutoTokenizer.from_pretrained(small_tokenizer).decode(ids[: lengths[0]]) == text


def test_separators_surround_each_document(small_tokenizer):
    info = describe_tokenizer(small_tokenizer, None)
    out, lengths = add_separators(np.array([7, 8], dtype=np.uint32), np.array([2, 0]), info)
    assert out.tolist() == [0, 7, 8, 1, 0, 1] and lengths.tolist() == [4, 2]


def test_bos_is_written_only_where_the_tokenizer_writes_it(tmp_path, small_tokenizer, corpus):
    folder = tmp_path / "t"
    folder.mkdir()
    raw = json.loads((small_tokenizer / "tokenizer.json").read_text())
    raw["post_processor"] = None  # as GPT-2's: a bos_token exists and is not put in front
    for token in raw["added_tokens"]:
        token["special"] = token["content"] != "[EOT]"  # and an end token that is not marked as special
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_bytes((small_tokenizer / "tokenizer_config.json").read_bytes())
    source = write_jsonl(tmp_path / "x.jsonl", ["one [EOT] two", "three"])
    options = ("--tokenizer", folder, "--block-size", 1, "--val-fraction", 0, "--out", tmp_path / "out")
    run_here("prep", source, *options)
    manifest = load_manifest(tmp_path / "out")
    tokens = Blocks(tmp_path / "out", "train").shard_tokens(0)
    assert not manifest.tokenizer.is_bos_written
    assert np.count_nonzero(tokens == 0) == 0 and np.count_nonzero(tokens == 1) == 2
    run_here("check", tmp_path / "out")


def test_a_trained_tokenizer_lies_beside_the_blocks(tmp_path, corpus):
    out = tmp_path / "out"
    run_here("prep", corpus, "--tokenizer", "train:320", "--block-size", 8, "--out", out)
    assert len(AutoTokenizer.from_pretrained(out / "tokenizer")) == 320
    assert load_manifest(out).tokenizer.source == {"train": 320}
    assert read_documents(out, "train")[0] == f"{WORDS}0"


def test_bytes_per_token_add_up_to_the_text(small_tokenizer):
    loaded = AutoTokenizer.from_pretrained(small_tokenizer)
    lengths = token_byte_lengths(loaded)
    assert lengths.shape == (len(loaded),) and lengths[:4].tolist() == [0, 0, 0, 0]
    for text in PROBES[:-1]:
        assert lengths[loaded(text)["input_ids"]].sum() == len(text.encode())


def test_bytes_per_token_of_a_sentencepiece_bpe(tmp_path):
    from tokenizers import AddedToken, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    lengths = token_byte_lengths(loaded)
    assert lengths[:3].tolist() == [0, 0, 0] and lengths[3:259].tolist() == [1] * 256
    text = "a é 日 a"
    assert lengths[loaded(text)["input_ids"]].sum() == len(text.encode()) + 1  # the space that the normaliser prepends
