"""accelerate_configs/ and ds_configs/: what the launchers make of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from clm.recipe import load_recipe
from data_prep.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# Prints what the Trainer sees. DeepSpeed on a CPU wants its process group made first, by gloo.
SHOW_LAUNCH = """
import json, os, sys
from accelerate import PartialState
deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if deepspeed:
    PartialState(backend="gloo")
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
arguments = TrainingArguments(
    output_dir=sys.argv[1], report_to=[], use_cpu=not deepspeed, max_grad_norm=0.5, gradient_accumulation_steps=4,
    per_device_train_batch_size=2, accelerator_config={"use_configured_state": deepspeed},
)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
trainer = Trainer(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)), arguments)
plugin = trainer.accelerator.state.deepspeed_plugin
if arguments.process_index == 0:
    seen = {"world_size": arguments.world_size, "mixed_precision": trainer.accelerator.mixed_precision}
    print("SEEN" + json.dumps({**seen, "deepspeed": plugin and plugin.deepspeed_config}))
"""


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def launch(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> dict:
    script = tmp_path / "show_launch.py"
    script.write_text(SHOW_LAUNCH)
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(script), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    return json.loads(line.removeprefix("SEEN"))


def test_there_is_a_launcher_of_each_kind():
    stems = [path.stem for path in ACCELERATE_CONFIGS]
    assert stems[:6] == ["cpu", "ddp", "fsdp2", "hsdp", "multi_node_ddp", "multi_node_fsdp2"]
    assert stems[6:] == ["single_gpu", "tp", "tp_fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
    table = (ROOT / "accelerate_configs" / "README.md").read_text()
    assert all(f"| `{path.name}` |" in table for path in ACCELERATE_CONFIGS)


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=names(ACCELERATE_CONFIGS))
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))  # raises on a key it does not know
    assert config.mixed_precision is None, "precision is the recipe's business"
    assert config.num_processes == (1 if path.stem in ("cpu", "single_gpu") else -1), "the command line says how many"


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=names(ACCELERATE_CONFIGS))
def test_a_deepspeed_launcher_names_a_file_that_exists_and_nothing_else(path):
    settings = yaml.safe_load(path.read_text()).get("deepspeed_config", {})
    # accelerate refuses zero_stage, gradient_clipping and the like beside a file, at launch only.
    assert set(settings) == ({"deepspeed_config_file"} if path.name.startswith("zero") else set())
    for file in settings.values():
        assert (ROOT / file).is_file() and Path(file).stem == path.stem


@pytest.mark.parametrize("path", DS_CONFIGS, ids=names(DS_CONFIGS))
def test_a_deepspeed_config_sets_stage_and_offload_and_leaves_the_rest_to_the_recipe(path):
    config = json.loads(path.read_text())
    zero = config.pop("zero_optimization")
    assert path.stem.removesuffix("_offload") == f"zero{zero['stage']}"
    devices = {zero[key]["device"] for key in ("offload_optimizer", "offload_param") if key in zero}
    assert devices == ({"cpu"} if path.stem.endswith("_offload") else {"none"})
    assert set(zero) <= {"stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save"}
    assert all(value in ("auto", {"enabled": "auto"}) for value in config.values())


@pytest.mark.parametrize("path", DS_CONFIGS, ids=names(DS_CONFIGS))
def test_transformers_fills_every_auto_of_a_deepspeed_config(path, tmp_path):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    config = HfTrainerDeepSpeedConfig(str(path))
    try:
        assert config.is_zero2() == (path.stem == "zero2") and config.is_zero3() == ("zero3" in path.stem)
        assert config.is_offload() == path.stem.endswith("_offload")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_grad_norm=0.5, gradient_accumulation_steps=4, report_to=[]
        )
        arguments.per_device_train_batch_size = 2
        config.trainer_config_process(arguments)
        assert config.mismatches == []
        assert "auto" not in json.dumps(config.config)
        assert config.config["train_batch_size"] == 2 * 4
        assert config.config["gradient_clipping"] == 0.5
        # Without it ZeRO 3 would save a checkpoint without model.safetensors.
        assert "zero3" not in path.stem or config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    finally:
        unset_hf_deepspeed_config()


# Recipes that some launchers cannot run -> why. All others must pass everywhere; docs/launch.md has the reasons.
REFUSED = {
    ("llama_437m.yaml", "fsdp"): "training.optim is adamw_bnb_8bit, whose state under FSDP2 is not that of the whole",
    ("mixtral_1.6b.yaml", "deepspeed"): "run.optimizer is muon but DeepSpeed makes the update",
    ("llama_437m.yaml", "tp"): "training.optim is adamw_bnb_8bit, whose state under tensor parallelism is not that",
    ("mixtral_1.6b.yaml", "tp"): "a mixtral model, but tensor parallelism is tested with gemma, llama",
    **{
        (f"{name}.yaml", "tp"): "with num_key_value_heads 3, which tp_size 2 does not divide"
        for name in ("llama_170m", "llama_170m_low_high", "llama_170m_short_long")
    },
}


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=names(ACCELERATE_CONFIGS))
def test_every_recipe_runs_with_this_launcher_or_is_refused_for_a_documented_reason(path, monkeypatch, capsys):
    import run_clm

    num_processes = 2 if path.stem == "tp" else 16
    several = [] if path.stem in ("cpu", "single_gpu") else ["--num_processes", str(num_processes)]
    if path.stem.startswith("multi_node"):
        several += ["--machine_rank", "0", "--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *several, "run_clm.py", "recipe"])
    arguments, *_ = _validate_launch_command(arguments)
    environment = {"ACCELERATE_USE_DEEPSPEED": "true"} if arguments.use_deepspeed else {}
    if arguments.use_fsdp or arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if several:
        monkeypatch.setenv("WORLD_SIZE", str(arguments.num_processes))
    refused = {}
    for recipe in RECIPES:
        batch = four_rows_each(recipe, num_processes) if several else []
        try:
            run_clm.main([str(recipe), "--dry-run", *batch])
        except UserError as error:
            refused[recipe.name] = str(error)
        else:
            shown = f"x {arguments.num_processes} process"
            if path.stem.startswith("tp"):
                shown = f"x {num_processes // 2} group"
            assert shown in capsys.readouterr().out
    engines = {"tp": path.stem.startswith("tp"), "fsdp": arguments.use_fsdp, "deepspeed": arguments.use_deepspeed}
    engine = next((name for name, is_used in engines.items() if is_used), None)
    expected = {name: reason for (name, kind), reason in REFUSED.items() if kind == engine}
    assert refused.keys() == expected.keys(), refused
    assert all(reason in refused[name] for name, reason in expected.items())
    # the command in the launcher's own header is not one of those
    header = path.read_text().partition("compute_environment")[0]
    (recipe,) = set(re.findall(r"recipes/\w+\.yaml", header))
    overrides = re.findall(r"training\.\w+=\w+", header)
    batch = four_rows_each(ROOT / recipe, num_processes) if several else []
    run_clm.main([str(ROOT / recipe), "--dry-run", *batch, *overrides])


def four_rows_each(recipe: Path, num_processes: int) -> list[str]:
    """A global batch that divides, of recipes that are made for one process."""
    block_size = load_recipe(str(recipe), []).data.block_size
    return [
        "training.per_device_train_batch_size=4",
        f"data.tokens_per_step={4 * block_size * num_processes}",
        "data.max_epochs=1e9",
    ]


@pytest.mark.slow
def test_ddp_on_two_cpu_processes_is_one_run_of_two(tmp_path):
    ddp = ("--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2", "--main_process_port", "0")
    assert launch(tmp_path, *ddp, env={"ACCELERATE_USE_CPU": "1"})["world_size"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication with c++")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_launch_takes_its_numbers_from_the_training_arguments(stage, tmp_path):
    pytest.importorskip("deepspeed", exc_type=ImportError)
    file = f"accelerate_configs/zero{stage}.yaml"
    seen = launch(tmp_path, "--config_file", file, "--num_processes", "1", "--main_process_port", "0")
    assert seen["deepspeed"]["zero_optimization"]["stage"] == stage
    assert seen["deepspeed"]["gradient_accumulation_steps"] == 4
    assert seen["deepspeed"]["gradient_clipping"] == 0.5
    assert seen["deepspeed"]["train_micro_batch_size_per_gpu"] == 2
    assert "auto" not in json.dumps(seen["deepspeed"])
