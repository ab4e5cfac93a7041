"""The same cases on the plain transformers Trainer and on ours.

Those that it fails are strict expected failures: when a version of transformers mends one, the test says so, and the
row leaves the table of docs/resume.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import CASES, Case
from .programs import Ours, Stock

ROOT = Path(__file__).parents[2]


def expect(case: Case) -> pytest.param:
    marks = [pytest.mark.xfail(strict=True, reason=case.stock, raises=(AssertionError, TimeoutError))]
    return pytest.param(case, id=case.name, marks=marks if case.stock else [])


def test_the_table_of_the_docs_is_that_of_the_cases():
    text = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")
    rows = [line for line in text[text.index("| fault | plain") :].splitlines()[2:] if line.startswith("|")]
    assert rows[: len(CASES)] == [f"| {case.what} | {case.stock or case.ours} | {case.ours} |" for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("case", [expect(case) for case in CASES])
def test_the_plain_trainer(case, fork_server, tmp_path, prepared, request):
    if case.needs_faults:
        request.getfixturevalue("faults")
    case.run(Stock(fork_server, tmp_path, prepared.folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ours(case, fork_server, tmp_path, prepared, request):
    if case.needs_faults:
        request.getfixturevalue("faults")
    case.run(Ours(fork_server, tmp_path, prepared.folder))
