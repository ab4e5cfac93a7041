"""The sections of a recipe as dataclasses: every key, its type and its default. Their values are checked when read.

`training` is no dataclass: it holds transformers.TrainingArguments under their own names (clm/arguments.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clm.timeline import Schedule


@dataclass(frozen=True)
class MixtureItem:
    """One dataset of the mixture: a name under data/ or a path, and how much of it; one of the three is set.

    `weight` is a share of the tokens on any scale; `tokens` and `epochs` (passes over the dataset) are amounts.
    """

    dataset: str
    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class StageItem:
    """One stage of `data.stages`; what it does not say is the run's."""

    name: str
    tokens: int | None = None
    mixture: tuple[MixtureItem, ...] | None = None
    block_size: int | None = None
    tokens_per_step: int | None = None
    schedule: Schedule | None = None
    rope: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationItem:
    """One named validation set: the first `tokens` tokens of a dataset's validation split (None: all of it)."""

    dataset: str
    tokens: int | None = None


@dataclass(frozen=True)
class SampleSettings:
    """Texts that are written to samples.jsonl at each evaluation."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_k: int = 20


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the `last` newest, the `best` by validation loss, one per `every_tokens`.

    `weights` says what becomes of the others: deleted (none), or reduced to their weights (all, or the newest N).
    """

    last: int = 2
    best: int = 0
    every_tokens: int | None = None
    weights: str | int = "none"


@dataclass(frozen=True)
class SpikeSettings:
    """What is a spike (`threshold` robust deviations above the last `window` steps), and what is done about it."""

    policy: str = "report"
    window: int = 128
    threshold: float = 10.0
    max_rollbacks: int = 3


@dataclass(frozen=True)
class MuonSettings:
    """Muon's part of `optimizer: muon`; `weight_decay` None is training.weight_decay, `adjust` as in clm/muon.py."""

    learning_rate: float = 0.02
    momentum: float = 0.95
    weight_decay: float | None = None
    adjust: str = "original"


@dataclass(frozen=True)
class EmaSettings:
    """The moving average of the weights (clm/ema.py); `decay` None: there is none."""

    decay: float | None = None


@dataclass
class ModelSection:
    """What is trained. `config`: architecture for `init: random`; `init`: random, or a folder or Hub id to continue."""

    config: str | None = None
    init: str = "random"
    attention: str = "auto"
    scaled_init: bool = False
    residual_dtype: str = "fp32"
    fp8: bool = False
    rope: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSection:
    """What it is trained on. Token counts may be written 10B, 262_144, 2M; `tokenizer` is what prep uses."""

    mixture: tuple[MixtureItem, ...] = ()
    stages: tuple[StageItem, ...] = ()
    tokenizer: str | None = None
    block_size: int = 0
    tokens: int | None = None
    tokens_per_step: int = 0
    validation: tuple[ValidationItem, ...] | None = None
    shuffle: bool = True
    document_mask: bool = False
    max_epochs: float = 4.0
    permute_labels: bool = False

    @property
    def all_stages(self) -> tuple[StageItem, ...]:
        """The stages; a recipe without `stages` is one."""
        return self.stages or (StageItem("main", self.tokens),)

    def mixture_of(self, stage: StageItem) -> tuple[MixtureItem, ...]:
        """The stage's own mixture, else the run's."""
        return self.mixture if stage.mixture is None else stage.mixture

    @property
    def datasets(self) -> dict[str, str]:
        """All datasets of the run in the order of their first use, and the key that names each first."""
        found: dict[str, str] = {}
        for i, stage in enumerate(self.all_stages):
            key = "data.mixture" if stage.mixture is None else f"data.stages[{i}].mixture"
            for k, item in enumerate(self.mixture_of(stage)):
                found.setdefault(item.dataset, f"{key}[{k}]")
        return found


@dataclass
class RunSection:
    """What Trainer has no word for."""

    samples: SampleSettings = field(default_factory=SampleSettings)
    retention: Retention = field(default_factory=Retention)
    spikes: SpikeSettings = field(default_factory=SpikeSettings)
    speed: str = "fast"
    loss: str = "auto"
    optimizer: str = "trainer"
    muon: MuonSettings = field(default_factory=MuonSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    z_loss: float | None = None
    schedule_tokens: int | None = None
    warmup_tokens: int | None = None
    decay_tokens: int | None = None
    peak_tflops: float | None = None
    save_in_background: bool = True
    preflight: bool = True
    full_disk: str = "continue"
    record_blocks: bool = False
    uneven_batch: bool = False
