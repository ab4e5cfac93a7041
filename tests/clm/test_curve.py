import json
import time
import xml.etree.ElementTree as ElementTree

import pytest

from clm.curve import draw_curve
from data_prep.errors import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    return folder


def write_metrics(run, records):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def texts_of(path):
    # matplotlib draws letters as shapes and leaves the words in comments
    return path.read_text()


def test_the_curve_names_the_run_and_its_newest_validation_loss_in_nats_and_bits_per_byte(run):
    training = [{"step": i, "tokens": i * 10**6, "loss": 9 - i / 20, "learning_rate": 1e-3} for i in range(1, 50)]
    evaluations = [{"step": i, "tokens": i * 10**6, "eval_loss": 4.25, "eval_bits_per_byte": 1.75} for i in (0, 49)]
    write_metrics(
        run, [evaluations[0], *training, evaluations[1], {"step": 49, "tokens": 49 * 10**6, "finished": True}]
    )
    path = draw_curve(run)
    assert path == run / "curve.svg"
    ElementTree.parse(path)
    picture = texts_of(path)
    for words in ("my_run", "validation loss (last 4.250 = 1.750 bits per byte)", "M tokens seen", "learning rate"):
        assert f"<!-- {words} -->" in picture
    assert [file.name for file in run.iterdir() if file.name.startswith(".")] == []


def test_the_same_metrics_give_the_same_bytes_without_a_date(run):
    write_metrics(run, [{"step": 1, "tokens": 2048, "loss": 3.0, "learning_rate": 1e-3}])
    first = draw_curve(run).read_bytes()
    assert draw_curve(run).read_bytes() == first
    assert b"<dc:date>" not in first


def test_a_loss_that_is_not_a_number_leaves_the_rest_of_the_curve(run):
    write_metrics(run, [{"step": 1, "tokens": 10, "loss": 3.0}, {"step": 2, "tokens": 20, "loss": float("nan")}])
    assert "<!-- training loss (last 3.000) -->" in texts_of(draw_curve(run))


def test_a_run_with_a_hundred_thousand_points_is_drawn_in_a_small_file_within_seconds(run):
    draw = [{"step": i, "tokens": i * 4096, "loss": 4 + 1 / (i + 1), "learning_rate": 1e-3} for i in range(100_000)]
    write_metrics(run, draw)
    started_at = time.perf_counter()
    path = draw_curve(run)
    assert time.perf_counter() - started_at < 30
    assert path.stat().st_size < 300_000


def test_a_run_without_a_loss_is_an_error_that_says_when_the_curve_comes(run):
    with pytest.raises(UserError, match="no loss yet"):
        draw_curve(run)
