"""Readers of what `run:` says of the optimizer and of what becomes of its updates.

In: the mapping of the section `run`. Out: the dataclass of clm/recipe_sections.py, each key checked.
"""

from __future__ import annotations

from clm.problems import (
    Problems,
    keys_of,
    read_choice,
    read_mapping,
    read_optional_number,
    read_positive_number,
    refuse_unknown,
)
from clm.recipe_sections import EmaSettings, MuonSettings

ADJUSTMENTS = ("original", "match_rms_adamw")


def read_muon(raw: dict, problems: Problems) -> MuonSettings:
    """`run.muon`."""
    settings = read_mapping(raw, "run.muon", problems)
    refuse_unknown("run.muon", settings, keys_of(MuonSettings), problems)
    momentum = read_positive_number(settings, "run.muon.momentum", 0.95, problems)
    if momentum >= 1:
        problems.add("run.muon.momentum", f"is {momentum} but must be below 1.")
    decay = settings.get("weight_decay")
    if decay is not None and decay != 0:  # 0 switches it off, which "a number above 0" would refuse
        decay = read_positive_number(settings, "run.muon.weight_decay", 0.1, problems)
    muon = MuonSettings(
        learning_rate=read_positive_number(settings, "run.muon.learning_rate", 0.02, problems),
        momentum=momentum,
        weight_decay=decay,
        adjust=read_choice(settings, "run.muon.adjust", "original", ADJUSTMENTS, problems),
    )
    if muon != MuonSettings() and raw.get("optimizer") != "muon":  # a run's record has the defaults written out
        problems.add("run.muon", "is set but run.optimizer is not muon. Set run.optimizer: muon, or remove it.")
    return muon


def read_ema(raw: dict, problems: Problems) -> EmaSettings:
    """`run.ema`."""
    settings = read_mapping(raw, "run.ema", problems)
    refuse_unknown("run.ema", settings, keys_of(EmaSettings), problems)
    decay = read_optional_number(settings, "run.ema.decay", problems)
    if decay is not None and decay >= 1:
        problems.add("run.ema.decay", f"is {decay} but must be below 1.")
    return EmaSettings(decay)
