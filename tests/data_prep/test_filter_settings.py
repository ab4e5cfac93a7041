"""What may stand under `filters`: every mistake in one message, before anything is read or imported."""

import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import write_jsonl

from data_prep.catalog import read_entry
from data_prep.errors import UserError
from data_prep.filter_settings import OPTIONS, load_filters, make_filters


def test_all_mistakes_are_told_at_once_with_what_was_meant():
    raw = {
        "gopher_qualty": True,
        "c4": {"min_num_sentence": 3, "filter_javascript": "no"},
        "pii": "yes",
        "normalize": {"normalization": "nfc"},
        "gopher_repetition": {"top_n_grams": [2, 0.2]},
        "language": {"keep": "en"},
        "exact_duplicates": {"x": 1},
        "near_duplicates": {"num_buckets": 0},
    }
    with pytest.raises(UserError) as error:
        make_filters(raw, "f.yaml: ")
    assert str(error.value).splitlines() == [
        "f.yaml: gopher_qualty: unknown filter. Did you mean gopher_quality or gopher_repetition?",
        "f.yaml: c4.min_num_sentence: unknown option. Did you mean min_num_sentences?",
        "f.yaml: c4.filter_javascript is 'no' but must be true or false",
        "f.yaml: pii is 'yes' but must be true, false or a mapping of its options",
        'f.yaml: normalize.normalization is \'nfc\' but must be one of null, "NFC", "NFD", "NFKC", "NFKD"',
        "f.yaml: gopher_repetition.top_n_grams is [2, 0.2] but must be pairs of a length and a share, such as "
        "[[2, 0.2], [3, 0.18]]",
        "f.yaml: language.keep is 'en' but must be a list of texts, not empty",
        "f.yaml: language.model is missing. Write language: {model: lid.176.bin, keep: [en]}; the model is fastText's: "
        "curl -LO https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin",
        "f.yaml: exact_duplicates.x: unknown option. It has none; write true.",
        "f.yaml: near_duplicates.num_buckets is 0 but must be a whole number of at least 1",
    ]


def test_a_file_that_is_not_there_is_told_with_the_command_that_gets_it():
    with pytest.raises(UserError, match=r"language.model is lid.bin but .* Download it: curl -LO https://dl.fbai"):
        make_filters({"language": {"model": "lid.bin", "keep": ["en"]}}, "")
    with pytest.raises(UserError, match=r"decontaminate is x.jsonl but it cannot be read \(No such file"):
        make_filters({"decontaminate": ["x.jsonl"]}, "")


def test_a_file_is_known_by_its_content_and_settings_by_their_values(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / name, ["some text"])
    one, two = (make_filters({"decontaminate": [str(tmp_path / name)]}, "") for name in ("a", "b"))
    assert one.settings() == two.settings() != one.options
    assert make_filters({"c4": True}, "").settings() == make_filters({"c4": {"min_num_sentences": 5}}, "").settings()
    assert make_filters({"c4": False, "pii": None}, "") is None
    assert list(make_filters({"exact_duplicates": True, "c4": True}, "").options) == ["c4", "exact_duplicates"]


def test_filters_may_stand_in_the_yaml_of_a_dataset(tmp_path):
    path = tmp_path / "mine.yaml"
    head = (
        "description: x\npath: x.jsonl\nlicence: x\nsource_of_numbers: x\ndefault_tokenizer: x\ndefault_block_size: 8\n"
    )
    path.write_text(head + "filters:\n  pii: true\n  near_duplicates: {n_grams: 4}\n")
    assert read_entry(path).filters == {"pii": True, "near_duplicates": {"n_grams": 4}}
    path.write_text(head + "filters:\n  pi: true\n")
    with pytest.raises(UserError, match=r"mine.yaml: filters.pi: unknown filter. Did you mean pii\?"):
        read_entry(path)


def test_the_filters_of_the_docs_are_filters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "evaluation.jsonl", ["some text"])
    page = (Path(__file__).parents[2] / "docs" / "corpus.md").read_text(encoding="utf-8")
    Path("filters.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    filters = make_filters(load_filters("filters.yaml"), "")
    table = [
        line.split("|")[1].strip(" `") for line in page.partition("## The filters")[2].splitlines() if "| `" in line
    ]
    assert set(filters.options) < set(OPTIONS) and table[: len(OPTIONS)] == list(OPTIONS)


def test_without_filters_nothing_of_them_is_imported(tmp_path, small_tokenizer, run_cli):
    source = write_jsonl(tmp_path / "x.jsonl", ["some text"] * 9)
    words = [
        "prep",
        str(source),
        "--tokenizer",
        str(small_tokenizer),
        "--block-size",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    code = f"import sys\nfrom data_prep.__main__ import main\nassert main({words!r}) == 0\n"
    code += "print({'datatrove', 'spacy', 'ftfy', 'data_prep.sieve', 'data_prep.screening'} & set(sys.modules))"
    result = run_cli(["-c", code])
    assert result.code == 0 and result.stdout.endswith("set()\n"), result.stderr


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, small_tokenizer, fails, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "f.yaml").write_text("language: {model: f.yaml, keep: [en]}")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ["some text"])
    message = fails("prep", "x.jsonl", "--filters", "f.yaml", "--tokenizer", small_tokenizer, "--block-size", 1)
    assert "language need datatrove, spacy, fasttext-community, which is not installed" in message
    assert "-e '.[corpus]'" in message and not Path("data/x").exists()


def test_the_options_and_their_defaults_are_those_of_datatrove():
    if find_spec("datatrove") is None:
        pytest.skip("the extra corpus is not installed")
    from datatrove.pipeline import filters, formatters
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    ours = {"code", "language", "keep", "model"}
    theirs = {
        "normalize": formatters.FTFYFormatter,
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
        "pii": formatters.PIIFormatter,
        "near_duplicates": MinhashConfig,
    }
    left_out = {"exclusion_writer", "stop_chars", "language", "norm_config", "hash_config"}
    for name, kind in theirs.items():
        parameters = inspect.signature(kind).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.name not in left_out}
        known = {option: default for option, default in OPTIONS[name].items() if option not in ours}
        assert json.loads(json.dumps(defaults)) == known, name
    assert "datatrove" in sys.modules
