"""README.md and docs/ say what is true: commands run, links lead somewhere, keys and options exist.

A command that is new in README.md fails here until CHECKS says how it is run.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from make_here import make

import run_clm
from clm import recipe as recipe_module
from clm.arguments import check_training
from clm.model import count_parameters, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("[a-z]*/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def shell_commands(path: Path) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    blocks = [body for language, body in FENCE.findall(path.read_text(encoding="utf-8")) if language == "bash"]
    lines = [shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def code(path: Path) -> str:
    """All that a page shows as code: fenced, indented and inline."""
    text = path.read_text(encoding="utf-8")
    fenced = [body for _, body in FENCE.findall(text)]
    rest = FENCE.sub("", text)
    indented = re.findall(r"^    .*$", rest, flags=re.MULTILINE)
    return "\n".join([*fenced, *indented, *re.findall(r"`([^`]+)`", rest)])


# --- the commands of README.md ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder like a clone's, with notes/: the text of this repository stands for the user's own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("recipes", "model_configs", "run_clm.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notes").mkdir()
    for path in [*ROOT.glob("[a-z]*/*.py"), *ROOT.glob("tests/*/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]:
        if path.stat().st_size:
            shutil.copy(path, folder / "notes" / "-".join(path.relative_to(ROOT).parts))
    return folder


class Here:
    """Runs one README command offline, in a folder of its own."""

    def __init__(self, run_cli: Callable, elsewhere: Path, tmp_path: Path):
        self.run_cli, self.elsewhere, self.tmp_path = run_cli, elsewhere, tmp_path
        self.env = {"DATA_DIR": str(tmp_path / "data"), "RUNS_DIR": str(tmp_path / "runs")}
        self.env["HF_HOME"] = str(tmp_path / "cache")

    def python(self, command: str, *more: str) -> str:
        """Run a `python ...` command to its end; its output."""
        words = shlex.split(command)
        assert words[0] == "python"
        result = self.run_cli([*words[1:], *more], cwd=self.elsewhere)
        assert result.code == 0, result.stderr
        return result.stdout

    def launch(self, command: str) -> str:
        """Run an `accelerate launch ...` command to its end; its output."""
        words = shlex.split(command)
        assert words[:2] == ["accelerate", "launch"]
        result = self.run_cli(["-m", "accelerate.commands.launch", *words[2:]], env=self.env)
        assert result.code == 0, result.stderr
        return result.stdout

    def make_fails(self, command: str) -> str:
        """Run a `make ...` command that needs what is not here: exit code 2, one message, nothing written."""
        marks = self.tmp_path / "marks"
        marks.mkdir()
        done = make(*shlex.split(command)[1:], marks=marks, env=self.env)
        message, last = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("make: ***"), done.stderr
        assert message.startswith("error: ") and "Traceback" not in done.stderr
        assert not (self.tmp_path / "data").exists() and not (self.tmp_path / "runs").exists()
        return message


def check_demo(here: Here, command: str) -> None:
    slow = (ROOT / "tests/end_to_end/test_demo.py").read_text(encoding="utf-8")
    assert "def test_make_demo_ends_with_a_model_that_has_learned_and_does_nothing_the_second_time" in slow


def check_test(here: Here, command: str) -> None:
    done = make("--dry-run", "test", marks=here.tmp_path, env={})
    assert done.stdout.splitlines()[-1].strip() == f"{shlex.quote(sys.executable)} -m pytest -n 2"  # it runs this


def check_fineweb(here: Here, command: str) -> None:
    assert "HuggingFaceFW/fineweb" in here.make_fails(command)


def check_launch(here: Here, command: str) -> None:
    assert f"{command} --dry-run" in shell_commands(ROOT / "README.md"), "without a GPU it is run as a dry run"


def check_dry_run(here: Here, command: str) -> None:
    text = here.launch(command)
    assert "179,448,576 parameters (179.45 x 10^6, 171.14 x 2^20)" in text
    assert "38,147 steps" in text and "not checked" in text


def check_prep(here: Here, command: str) -> None:
    here.python(command)
    assert (here.elsewhere / "data/notes/manifest.json").is_file()
    assert "nothing to do" in here.python(command)


def check_inspect(here: Here, command: str) -> None:
    text = here.python(command)
    assert "=== document 0: notes/" in text and "=== block 0: tokens 0 to 256" in text


def check_own_text(here: Here, command: str) -> None:
    text = here.python(command, "--dry-run")
    assert "run          notes" in text and "data         notes: 100 % of the run" in text
    assert "validation   notes:" in text


def check_prep_recipe(here: Here, command: str) -> None:
    assert "Salesforce/wikitext" in here.make_fails(command)


def check_train(here: Here, command: str) -> None:
    assert "make prep RECIPE=recipes/continue_base.yaml" in here.make_fails(command)


def check_verify(here: Here, command: str) -> None:  # itself: tests/verify/test_verify.py
    assert "make prep DATASET=stdlib" in here.make_fails(command)


def check_push(here: Here, command: str) -> None:  # the upload itself: tests/clm/test_push.py
    assert "this run does not exist" in here.make_fails(command)


OWN_TEXT = (
    "python run_clm.py recipes/demo.yaml 'data.mixture=[{dataset: notes}]' 'data.validation=[{dataset: notes}]' "
    "data.tokens=400K training.run_name=notes"
)
CHECKS: dict[str, Callable[[Here, str], None]] = {
    "make demo": check_demo,
    "make test": check_test,
    "make prep DATASET=fineweb": check_fineweb,
    "accelerate launch run_clm.py recipes/llama_170m.yaml": check_launch,
    "accelerate launch run_clm.py recipes/llama_170m.yaml --dry-run": check_dry_run,
    "python -m data_prep prep notes/ --tokenizer train:4096 --block-size 256 --val-fraction 0.1 --out data/notes": (
        check_prep
    ),
    "python -m data_prep inspect notes": check_inspect,
    OWN_TEXT: check_own_text,
    "make prep RECIPE=recipes/continue_base.yaml": check_prep_recipe,
    "make train RECIPE=recipes/continue_base.yaml": check_train,
    "make verify RECIPE=recipes/demo.yaml": check_verify,
    "make push RUN=continue_base 'ARGS=--repo-id user/name --private'": check_push,
}


def test_every_command_of_the_readme_is_one_that_is_run_here():
    assert set(shell_commands(ROOT / "README.md")) == set(CHECKS)


# one test, in README's order: a later command uses what an earlier one made
def test_every_command_of_the_readme_does_what_it_says(run_cli, elsewhere, tmp_path):
    for number, command in enumerate(shell_commands(ROOT / "README.md")):
        folder = tmp_path / str(number)
        folder.mkdir()
        CHECKS[command](Here(run_cli, elsewhere, folder), command)


def test_the_demo_of_the_readme_is_the_demo_of_the_recipe():
    demo = recipe_module.load_recipe(ROOT / "recipes/demo.yaml")
    num_steps = math.ceil(demo.data.tokens / demo.data.tokens_per_step)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| trained on | {demo.data.tokens:,} tokens, {num_steps:,} steps |" in readme
    millions = count_parameters(load_config(str(ROOT / demo.model.config))) / 1e6
    assert f"a Llama of {millions:.1f} M parameters on it" in readme


def test_the_table_of_recipes_has_their_parameters_and_tokens(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(ROOT.glob("recipes/*.yaml")):
        recipe = recipe_module.load_recipe(path)
        row = next(line for line in (ROOT / "recipes/README.md").read_text().splitlines() if f"]({path.name})" in line)
        _, parameters, tokens, *_ = [cell.strip() for cell in row.strip("|").split("|")]
        if recipe.model.config:
            assert parameters == f"{count_parameters(load_config(recipe.model.config)) / 1e6:.1f} M", row
        num_tokens = sum(stage.tokens for stage in recipe.data.all_stages)
        size, unit = (num_tokens / 1e9, "B") if num_tokens >= 1e9 else (num_tokens / 1e6, "M")
        assert tokens == f"{round(size, 1):g} {unit} of `{next(iter(recipe.data.datasets))}`", row


# --- docs/ ------------------------------------------------------------------------------------------------------------


def doc_commands() -> list[tuple[str, str]]:
    return [(page_id(path), command) for path in PAGES[1:] for command in shell_commands(path)]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_relative_link_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_readme_leads_to_every_page_and_recipes_readme_to_every_recipe():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in ROOT.glob("docs/*.md") if f"](docs/{path.name})" not in readme]
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert not [path.name for path in ROOT.glob("recipes/*.yaml") if f"| [{path.name}]({path.name}) |" not in table]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_make_verb_exists(path):
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for verb in re.findall(r"\bmake ([a-z][a-z-]*)", code(path)):
        assert verb in verbs, f"make {verb}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_file_and_function_of_the_code_that_is_named_exists(path):
    text = code(path)
    for name in re.findall(
        r"(?<![\w/])(?:data_prep|clm|recipes|model_configs|accelerate_configs|ds_configs)/[\w.-]+\.\w+", text
    ):
        assert (ROOT / name).exists() or name in ("recipes/x.yaml", "recipes/mine.yaml"), name


def test_the_path_of_one_document_names_functions_that_are_in_their_files():
    rows = re.findall(r"^\| .* \| (`(?:data_prep|clm)/.*`) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for files, names in rows:
        source = "".join((ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"`([^`]+)`", files))
        for name in re.findall(r"`([^`]+)`", names):
            assert re.search(rf"(?:def|class) {name.split('.')[-1]}\b", source), f"{name} is not in {files}"


@pytest.mark.parametrize(("page", "command"), doc_commands(), ids=lambda value: value)
def test_every_command_line_of_the_docs_is_accepted(page, command, monkeypatch, tmp_path):
    """Options and overrides are parsed by the real parsers; nothing is prepared or trained."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]  # an environment variable
    if words[:3] == ["python", "-m", "data_prep"]:
        from data_prep.__main__ import _make_parser

        _make_parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "clm"] and words[3] not in ("check", "prep"):
        from clm.__main__ import build_parser

        build_parser().parse_args(words[3:])
    elif words[0] == "make":
        assert make("--dry-run", *words[1:], marks=tmp_path, env={}).returncode == 0
        settings = dict(word.split("=", 1) for word in words[2:])
        if "RECIPE" in settings and not settings["RECIPE"].startswith("runs/"):  # a run's own, which is not here
            check_recipe_line([settings["RECIPE"], *shlex.split(settings.get("ARGS", ""))])
    elif "run_clm.py" in words:
        check_recipe_line(words[words.index("run_clm.py") + 1 :])
    else:
        assert words[0] in ("source", "tensorboard", "hf"), f"nobody checks {command}"


def check_recipe_line(words: list[str]) -> None:
    """A recipe, its overrides and options as run_clm.py reads them; data and model need not be there."""
    arguments = run_clm.parse_arguments(words)
    recipe = recipe_module.load_recipe(arguments.recipe, arguments.overrides)
    check_training(recipe)
    missing = [message for message in recipe.problems.messages if "is not installed" not in message]
    assert not missing, missing
