"""The rules of the house: imports go down only, importing does nothing, names say something, files stay small."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("clm", "data_prep")
CLM_MAY_IMPORT = {"errors", "sizes", "paths", "catalog", "manifest", "blocks", "documents", "lock", "memory"}
CLM_MAY_IMPORT |= {"token_bytes", "parts", "vocabulary"}
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "common", "misc", "stuff"}
LARGEST_FILE_LINES = 350
SECRETS = re.compile(
    r"\bhf_[A-Za-z]{34}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{30,}"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)


def list_files() -> list[str]:
    """Paths of all files of the repository, relative to its root; ignored ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return sorted(path for path in set(listed.stdout.split("\0")) if path and (ROOT / path).is_file())


def list_modules() -> list[str]:
    """Paths of the Python files that make up the product."""
    return [path for path in list_files() if path.endswith(".py") and path.split("/")[0] in (*PACKAGES, "run_clm.py")]


def list_imports(path: str) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions: `from a import b` gives "a.b"."""
    imports = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            imports |= {f"{node.module}.{alias.name}" for alias in node.names}
    return imports


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # transformers' Trainer announces WANDB_MODE=offline, which the tests set, on import.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def test_data_prep_imports_neither_clm_nor_torch():
    for path in list_modules():
        if path.startswith("data_prep/"):
            wrong = {
                name for name in list_imports(path) if name.split(".")[0] in ("clm", "torch", "accelerate", "run_clm")
            }
            assert not wrong, f"{path} imports {wrong}"


def test_clm_imports_only_the_reading_side_of_data_prep():
    for path in list_modules():
        if path.startswith("clm/") or path == "run_clm.py":
            below = {name.split(".")[1] for name in list_imports(path) if name.startswith("data_prep.")}
            assert below <= CLM_MAY_IMPORT, f"{path} imports data_prep's {sorted(below - CLM_MAY_IMPORT)}"


def test_nobody_imports_run_clm():
    for path in list_modules():
        assert not {name for name in list_imports(path) if name.split(".")[0] == "run_clm"}, path


def test_no_module_has_a_name_that_says_nothing_or_belongs_to_a_library():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + [
        item for extra in project["optional-dependencies"].values() for item in extra
    ]
    libraries = {
        re.match(r"[A-Za-z0-9_-]+", item)[0].replace("-", "_") for item in requirements
    } | sys.stdlib_module_names
    for path in list_modules():
        stem = Path(path).stem
        assert stem not in NAMES_THAT_SAY_NOTHING, path
        assert stem.startswith("__") or stem not in libraries, f"{path} is named like a library"


def test_importing_prints_nothing_reads_no_arguments_and_changes_nothing():
    modules = [dotted(path) for path in list_modules() if not path.endswith("__main__.py")]
    code = """
import importlib, os, sys
import matplotlib, torch, transformers.trainer  # what libraries do to the environment is their business
before = dict(os.environ), os.getcwd(), list(sys.path)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (dict(os.environ), os.getcwd(), list(sys.path)) == before
"""
    done = run_python(code, *modules)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_data_prep_and_the_command_lines_import_nothing_heavy():
    # `--help` and a prep with nothing left to do answer at once, and data_prep works where torch is not installed.
    modules = [dotted(path) for path in list_modules() if path.startswith("data_prep/")]
    code = """
import importlib, sys
sys.modules["torch"] = None  # importing it now raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted({"transformers", "datasets", "accelerate", "pandas", "matplotlib"} & set(sys.modules)))
"""
    done = run_python(code, *modules, "clm.__main__", "run_clm")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_no_python_file_is_two_things():
    for path in list_files():
        if path.endswith(".py"):
            num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            assert num_lines <= LARGEST_FILE_LINES, f"{path} has {num_lines} lines"


def test_every_module_says_what_it_is():
    for path in list_modules():
        assert ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_no_file_holds_a_secret():
    for path in list_files():
        found = SECRETS.search((ROOT / path).read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path} has something like a secret: {found[0][:8]}..."


def test_the_tree_in_the_readme_is_the_tree():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    trees = [
        block
        for block in blocks
        if all(f"\n{name}" in f"\n{block}" for name in ("run_clm.py ", "data_prep/ ", "recipes/ "))
    ]
    assert len(trees) == 1, "README.md has one block with the tree: a name and what it is, at the start of each line"
    shown = {line.split()[0].rstrip("/") for line in trees[0].splitlines() if line[:1].strip()}
    there = {path.split("/")[0] for path in list_files() if not path.startswith(".")}
    assert shown == there
