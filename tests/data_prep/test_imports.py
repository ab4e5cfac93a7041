"""data_prep stands on its own: no torch, nothing of clm, and nothing happens on import."""

import ast
from pathlib import Path

import pytest

import data_prep

FOLDER = Path(data_prep.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "__main__"))


def test_no_module_imports_torch_or_clm(run_cli):
    code = "import importlib, sys\n" + "".join(f"importlib.import_module('data_prep.{name}')\n" for name in MODULES)
    code += "bad = {'torch', 'clm', 'transformers', 'datasets'} & set(sys.modules)\nassert not bad, bad"
    result = run_cli(["-c", code])
    assert result.code == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


@pytest.mark.parametrize("name", ["__main__", *MODULES])
def test_every_module_says_what_it_is_and_nothing_imports_upwards(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {each.split(".")[0] for each in names} & {"torch", "clm", "run_clm"}


@pytest.mark.parametrize("command", [[], ["prep"], ["train-tokenizer"], ["inspect"], ["check"], ["stat"], ["datasets"]])
def test_help_is_quick_and_teaches(run_cli, command):
    result = run_cli(["-m", "data_prep", *command, "--help"])
    assert result.code == 0 and "usage:" in result.stdout
    if command in ([], ["prep"]):
        assert "examples:" in result.stdout
