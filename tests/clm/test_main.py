import subprocess
import sys

import pytest
from conftest import python_environment

from clm.__main__ import main


def clm(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=python_environment(), capture_output=True, text=True, timeout=60)


def test_help_teaches_with_examples_and_imports_nothing_heavy():
    script = "import sys; from clm.__main__ import build_parser; build_parser().format_help(); "
    script += (
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'huggingface_hub') if name in sys.modules])"
    )
    assert clm("-c", script).stdout.strip() == "[]"
    done = clm("-m", "clm", "--help")
    assert done.returncode == 0 and "python -m clm sample demo --prompt" in done.stdout
    for verb in ("check", "prep", "sample", "export", "push", "reload", "yardstick", "demo", "curve", "card"):
        assert f"\n    {verb}" in done.stdout


def test_a_users_mistake_is_one_line_on_stderr_and_exit_code_2(capsys):
    assert main(["curve", "nowhere/at/all"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: nowhere/at/all: this run does not exist.")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "wrong", [["sample", "x", "--num", "0"], ["sample", "x", "--temperature", "nan"], ["nonsense"]]
)
def test_a_wrong_argument_is_exit_code_2(wrong):
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2


def test_check_and_prep_have_command_lines_of_their_own(capsys):
    assert main(["check", "recipes/there_is_none.yaml"]) == 2
    assert "this recipe does not exist" in capsys.readouterr().err
    assert main(["prep", "recipes/there_is_none.yaml"]) == 2


def test_curve_card_sample_and_export_say_what_they_wrote(run_copy, capsys):
    assert main(["curve", str(run_copy)]) == 0
    assert capsys.readouterr().out.strip() == str(run_copy / "curve.svg")
    assert main(["card", str(run_copy), "--checkpoint", "10"]) == 0
    assert capsys.readouterr().out.strip() == str(run_copy / "checkpoint-10" / "README.md")
    assert main(["sample", str(run_copy), "--prompt", "the cat", "--num", "2", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("--- 'the cat'\nthe cat") == 2
    assert main(["export", str(run_copy)]) == 0
    assert str(run_copy / "export" / "lm") in capsys.readouterr().out
