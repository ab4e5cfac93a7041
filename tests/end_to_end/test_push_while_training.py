"""training.push_to_hub and its neighbours, against a Hub on this machine."""

import json
from pathlib import Path

import pytest
from hub_stand_in import HubStandIn

ROOT = Path(__file__).parents[2]


def train_with_hub(run_cli, recipe: Path, hub_url: str, tmp_path: Path, *overrides: str, token: str = HubStandIn.TOKEN):
    """A run in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    settings |= {"HF_HOME": str(tmp_path / "hf_home")}
    command = [ROOT / "run_clm.py", recipe, "data.tokens=5120", "training.push_to_hub=true", *overrides]
    return run_cli([*command, "training.hub_model_id=somebody/tiny"], env=settings)


def test_the_hub_gets_final_and_with_every_save_also_the_weights_of_checkpoints(run_cli, recipe, tmp_path):
    with HubStandIn() as hub:
        done = train_with_hub(run_cli, recipe, hub.url, tmp_path, "training.hub_strategy=every_save")
        assert done.code == 0, done.stderr
        final = tmp_path / "runs" / "tiny" / "final"
        received = hub.files("somebody/tiny")
        assert {name: received[name] for name in sorted(p.name for p in final.iterdir())} == {
            p.name: p.read_bytes() for p in sorted(final.iterdir())
        }
        assert not any("optimizer" in name or "rng_state" in name for name in received)
        assert "pushed to" in done.stdout
    assert HubStandIn.TOKEN not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "runs").rglob("*") if path.is_file()
    )


@pytest.mark.slow
def test_a_checkpoint_strategy_pushes_what_a_resume_needs(run_cli, recipe, tmp_path):
    with HubStandIn() as hub:
        done = train_with_hub(run_cli, recipe, hub.url, tmp_path, "training.hub_strategy=checkpoint")
        assert done.code == 0, done.stderr
        received = hub.files("somebody/tiny")
        assert "last-checkpoint/optimizer.pt" in received
        assert json.loads(received["last-checkpoint/checkpoint.json"])["step"] == 10


@pytest.mark.slow
def test_a_hub_that_refuses_is_told_before_the_training(run_cli, recipe, tmp_path):
    with HubStandIn(refuse_with=403) as hub:
        done = train_with_hub(run_cli, recipe, hub.url, tmp_path)
    assert done.code == 2 and "may not write to somebody/tiny (403)" in done.stderr
    assert "Traceback" not in done.stderr and "step 1/" not in done.stdout
    with HubStandIn() as hub:
        closed = hub.url
    done = train_with_hub(run_cli, recipe, closed, tmp_path)
    assert done.code == 2 and "cannot be reached" in done.stderr
