import pytest

from clm.__main__ import main, parse_arguments


def test_help_teaches_with_examples_and_imports_nothing_heavy(run_cli):
    script = "import sys; from clm.__main__ import build_parser; build_parser().format_help(); "
    script += (
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'huggingface_hub') if name in sys.modules])"
    )
    assert run_cli(["-c", script]).stdout.strip() == "[]"
    done = run_cli(["-m", "clm", "--help"])
    assert done.code == 0 and "python -m clm sample demo --prompt" in done.stdout
    for verb in ("check", "prep", "sample", "export", "push", "tune", "reload", "yardstick", "demo", "curve", "card"):
        assert f"\n    {verb}" in done.stdout


def test_a_users_mistake_is_one_line_on_stderr_and_exit_code_2(capsys):
    assert main(["curve", "nowhere/at/all"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: nowhere/at/all: this run does not exist.")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ["sample", "x", "--num", "0"],
        ["sample", "x", "--temperature", "nan"],
        ["sample", "x", "y"],
        ["tune", "x.yaml", "--quick"],
        ["nonsense"],
    ],
)
def test_a_wrong_argument_is_exit_code_2(wrong):
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2


def test_overrides_may_stand_before_and_behind_options():
    args = parse_arguments(["tune", "r.yaml", "training.seed=1", "--steps", "3", "run.loss=whole"])
    assert (args.recipe, args.overrides, args.steps) == ("r.yaml", ["training.seed=1", "run.loss=whole"], 3)


def test_check_and_prep_have_command_lines_of_their_own(capsys):
    assert main(["check", "recipes/there_is_none.yaml"]) == 2
    assert "this recipe does not exist" in capsys.readouterr().err
    assert main(["prep", "recipes/there_is_none.yaml"]) == 2


def test_curve_card_sample_and_export_say_what_they_wrote(run_copy, capsys):
    assert main(["curve", str(run_copy)]) == 0
    assert capsys.readouterr().out.strip() == str(run_copy / "curve.svg")
    assert main(["card", str(run_copy), "--checkpoint", "10"]) == 0
    assert capsys.readouterr().out.strip() == str(run_copy / "checkpoint-10" / "README.md")
    assert main(["sample", str(run_copy), "--prompt", "The river", "--num", "2", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("--- 'The river'\nThe river") == 2
    assert main(["export", str(run_copy)]) == 0
    assert str(run_copy / "export" / "lm") in capsys.readouterr().out
