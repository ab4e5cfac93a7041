"""The Makefile: its help, what it runs, and what it says when something is missing. Nothing is installed here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERBS = {"help", "install", "demo", "test", "lint", "datasets", "prep", "inspect", "stat", "check"}
VERBS |= {"train", "extend", "anneal", "sample", "explain", "verify", "tune", "export", "push"}


def make(*arguments: str, env: dict[str, str] | None = None, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=folder, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )


def commands(*arguments: str, env: dict[str, str] | None = None) -> list[str]:
    """The commands of our own that make would run, installation left out."""
    done = make("--dry-run", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r" +", " ", line).strip() for line in done.stdout.splitlines()]
    return [
        line
        for line in lines
        if re.match(r"\.venv/bin/(accelerate|python -m (clm|data_prep|pytest|ruff)|python run_clm)", line)
    ]


def test_make_alone_shows_every_verb():
    done = make()
    assert done.returncode == 0
    shown = re.findall(r"^  ([a-z-]+)  +[A-Z]", done.stdout, flags=re.MULTILINE)
    assert set(shown) >= VERBS
    assert done.stdout == make("help").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prep", "DATASET=fineweb"], ['.venv/bin/python -m data_prep prep "fineweb"']),
        (
            ["prep", "DATASET=a b", "TOKENIZER=t", "BLOCK_SIZE=64", "OUT=data/x", "PREP_ARGS=--max-docs 9"],
            ['.venv/bin/python -m data_prep prep "a b" --tokenizer "t" --block-size "64" --out "data/x" --max-docs 9'],
        ),
        (["prep", "RECIPE=recipes/demo.yaml"], ['.venv/bin/python -m clm prep "recipes/demo.yaml"']),
        (["inspect", "DATASET=stdlib"], ['.venv/bin/python -m data_prep inspect "stdlib"']),
        (["inspect", "DATASET=x", "ARGS=--show 3"], ['.venv/bin/python -m data_prep inspect "x" --show 3']),
        (["stat", "DATASET=stdlib"], ['.venv/bin/python -m data_prep stat "stdlib"']),
        (["check", "DATASET=stdlib"], ['.venv/bin/python -m data_prep check "stdlib"']),
        (["check", "RECIPE=r.yaml"], ['.venv/bin/python -m clm check "r.yaml"']),
        (
            ["train", "RECIPE=r.yaml", "ARGS=training.learning_rate=3e-4 data.tokens=1M"],
            [
                '.venv/bin/python -m clm check "r.yaml" training.learning_rate=3e-4 data.tokens=1M',
                '.venv/bin/accelerate launch --quiet run_clm.py "r.yaml" training.learning_rate=3e-4 data.tokens=1M',
            ],
        ),
        (["push", "RUN=demo", "ARGS=--private"], ['.venv/bin/python -m clm push "demo" --private']),
        (
            ["explain", "RUN=demo", "STEP=1200", "CHECKPOINT=1000"],
            ['.venv/bin/python -m clm explain "demo" --step "1200" --checkpoint "1000"'],
        ),
        (
            ["explain", "RUN=demo", 'GREP=say "$HOME"'],
            ['.venv/bin/python -m clm explain "demo" --grep="$CLM_GREP"'],
        ),
        (["verify", "RECIPE=r.yaml", "ARGS=--kills 9"], ['.venv/bin/python -m clm verify "r.yaml" --kills 9']),
        (["tune", "RECIPE=r.yaml", "ARGS=--write"], ['.venv/bin/python -m clm tune "r.yaml" --write']),
        (["extend", "RUN=demo", "TOKENS=2M"], ['.venv/bin/python -m clm extend "demo" --tokens "2M"']),
        (
            ["anneal", "FROM=runs/x/checkpoint-9", "TOKENS=1M", "DATA=hq"],
            ['.venv/bin/python -m clm anneal "runs/x/checkpoint-9" --tokens "1M" --data "hq"'],
        ),
        (["datasets"], [".venv/bin/python -m data_prep datasets"]),
    ],
)
def test_a_verb_calls_the_command_line(arguments, expected):
    assert commands(*arguments) == expected


def test_train_launches_with_a_config_and_options():
    launched = commands(
        "train", "RECIPE=r.yaml", "CONFIG=accelerate_configs/ddp.yaml", "LAUNCH_ARGS=--num_processes 2"
    )[-1]
    assert '--config_file "accelerate_configs/ddp.yaml" --num_processes 2 run_clm.py "r.yaml"' in launched


def test_demo_prepares_trains_and_proves():
    assert commands("demo") == [
        ".venv/bin/python -m clm prep recipes/demo.yaml",
        ".venv/bin/python run_clm.py recipes/demo.yaml",
        ".venv/bin/python -m clm demo demo",
    ]


@pytest.mark.parametrize(
    ("verb", "name"),
    [("prep", "DATASET"), ("inspect", "DATASET"), ("stat", "DATASET"), ("check", "DATASET"), ("train", "RECIPE")]
    + [("verify", "RECIPE"), ("tune", "RECIPE"), ("extend", "RUN"), ("anneal", "FROM")]
    + [(verb, "RUN") for verb in ("sample", "explain", "export", "push")],
)
def test_a_missing_name_is_one_sentence_with_an_example(verb, name):
    done = make(verb)
    assert done.returncode == 2
    message = done.stderr.splitlines()[0]
    assert message.startswith(f"error: {name} is not set. Example: make {verb} {name}=")
    assert "pip" not in done.stdout, "nothing is installed before the names are right"


def test_a_name_in_the_environment_redirects_nothing():
    assert commands("prep", "DATASET=stdlib", env={"OUT": "/elsewhere", "RECIPE": "r"}) == commands(
        "prep", "DATASET=stdlib"
    )


def test_a_recipe_and_a_dataset_contradict():
    done = make("prep", "RECIPE=recipes/demo.yaml", "OUT=data/x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: RECIPE=recipes/demo.yaml names its datasets")


def test_an_interpreter_that_is_not_there_or_too_old_is_one_sentence(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$*" in *exit*) exit 1;; *) echo Python 3.9.2;; esac\n')
    old.chmod(0o755)
    for interpreter, message in (
        (str(old), "is Python 3.9.2, but 3.11, 3.12 or 3.13 is needed"),
        ("/no/python", "is not a command"),
    ):
        done = make("install", f"PYTHON={interpreter}")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: PYTHON={interpreter} {message}")


def test_the_makefile_and_pyproject_agree_on_the_interpreters():
    assert 'requires-python = ">=3.11,<3.14"' in (ROOT / "pyproject.toml").read_text()
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "Makefile").read_text()


def test_torch_is_installed_alone_and_first_from_the_index_that_was_named(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = make("--dry-run", "install", "TORCH_INDEX=https://example.org/cpu", folder=tmp_path)
    first, second = [line for line in done.stdout.splitlines() if " pip install " in line]
    assert first.endswith('-c constraints.txt torch --extra-index-url "https://example.org/cpu"')
    assert second.endswith("-c constraints.txt -e '.[dev]'")


def test_constraints_begin_with_torch_and_pin_every_dependency():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", pin) for pin in pins), "exact versions, no local build"
    pinned = {pin.split("==")[0] for pin in pins}
    declared = re.findall(r'"([A-Za-z0-9_-]+)[><=][^"]*"', (ROOT / "pyproject.toml").read_text())
    needed = {name.lower().replace("_", "-") for name in declared} - {"setuptools", "flash-attn"}
    assert needed <= pinned, sorted(needed - pinned)
