"""The embedded corpus: the standard library of the Python that runs."""

import tokenize
from pathlib import Path

import pytest
from conftest import run_here

from data_prep.catalog import load_entry
from data_prep.readers import Piece, Reading, read_records
from data_prep.sources import list_local_files, parse_sources, stdlib_folder

READING = Reading("text", (), None, False)


@pytest.fixture(scope="module")
def stdlib_files():
    source = parse_sources(["stdlib"], text_column=None, on_bad_record=None, split_lines=False)[0]
    return list_local_files(source)[0]


def test_the_files_are_the_library_without_tests_and_packages(stdlib_files):
    names = [file.name for file in stdlib_files]
    assert names == sorted(names) and len(names) > 400
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in names)


def test_each_file_is_decoded_by_its_coding_line_with_newlines_kept(stdlib_files):
    for file in stdlib_files[::7]:
        record = next(read_records((Piece(0, file.path, "python"),), READING))
        data = Path(file.path).read_bytes()
        if record.text is not None and data:
            encoding = tokenize.detect_encoding(iter(data.splitlines(keepends=True)).__next__)[0]
            assert record.text.encode("utf-8" if encoding == "utf-8-sig" else encoding) == data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"# -*- coding: latin-1 -*-\r\nx = '\xe9'\r\n", "# -*- coding: latin-1 -*-\r\nx = 'é'\r\n"),
        ("x = 'é'\n".encode(), "x = 'é'\n"),
        (b"\xef\xbb\xbfx = 1\n", "\ufeffx = 1\n"),
        (b"x = '\xe9'\n", None),
        (b"# coding: no-such-code\n", None),
    ],
)
def test_a_coding_line_is_obeyed(tmp_path, data, text):
    (tmp_path / "x.py").write_bytes(data)
    record = next(read_records((Piece(0, str(tmp_path / "x.py"), "python"),), READING))
    assert record.text == text and (record.problem is None) == (text is not None)


def test_empty_and_undecodable_files_are_counted_not_fatal(tmp_path, monkeypatch, small_tokenizer, capsys):
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    (library / "a.py").write_text("import os\n" * 30)
    (library / "b.py").write_bytes(b"x = '\xff'\n")
    (library / "c.py").write_bytes(b"")
    (library / "test" / "d.py").write_text("assert 1\n")
    (library / "readme.txt").write_text("not Python\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    options = ("--tokenizer", small_tokenizer, "--block-size", 8, "--val-fraction", 0, "--out", tmp_path / "out")
    run_here("prep", "stdlib", *options)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stdlib"))
    assert row.split()[1:7] == ["3", "1", "1", "0", "1", "0"]  # read, empty, bad, beyond cap, train, validation


def test_the_yaml_asks_for_a_vocabulary_of_exactly_4096():
    entry = load_entry("stdlib")
    assert entry.default_tokenizer == {"train": 4096} and entry.default_block_size == 256
    assert entry.on_bad_record == "skip" and stdlib_folder().is_dir()
