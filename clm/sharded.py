"""Sharded checkpoints: model and optimizer in DTensors, written by each rank for itself, read in any layout.

In: a trainer under FSDP2 or tensor parallelism. Out: `sharded/` in a checkpoint, in the format of
torch.distributed.checkpoint (DCP):

    __<rank>_0.distcp     the shards of one rank
    .metadata             which part of which tensor lies where, put together by the publisher from the ranks' own

DCP's async_save copies the shards to host memory and writes them on a thread. It is told that there is no process
group: its own coordination is a collective on that thread, which hangs when another rank has died. A rank's part does
not depend on the others', so the publisher has only to join what the ranks say of theirs.
"""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clm.checkpoint import Files, hash_files
from clm.fsdp import fill, is_own_shard, reshard
from clm.same_weights import check_copies
from data_prep.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint import Metadata

    from clm.trainer import ClmTrainer

SHARDED = "sharded"
METADATA = ".metadata"
_MODEL, _OPTIMIZER, _GROUPS = "model.", "optimizer.", "param_groups"


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint's model and optimizer lie in `sharded/`."""
    return (checkpoint / SHARDED / METADATA).is_file()


def collect_shards(trainer: ClmTrainer) -> dict[str, Any]:
    """This rank's part of model and optimizer, live: sharded tensors as DTensors; what all ranks have alike is rank
    0's to write, and what several have, as with HSDP, the first one's of them."""
    model, optimizer = trainer.model, _plain(trainer.optimizer)
    reshard(model)
    is_first = trainer.args.process_index == 0
    state: dict[str, Any] = {}
    names = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        state[_MODEL + name] = parameter.detach()
    for name in persistent_buffers(model):
        state[_MODEL + name] = model.get_buffer(name)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            state[f"{_OPTIMIZER}{names[parameter]}.{key}"] = value
    if is_first:
        state[_GROUPS] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {
        name: value
        for name, value in state.items()
        if (is_own_shard(value) if hasattr(value, "device_mesh") else is_first)
    }


def persistent_buffers(model: torch.nn.Module) -> list[str]:
    """Buffers that belong to the model's state; a Llama has none."""
    saved = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name in saved]


def num_local_bytes(state: dict[str, Any]) -> int:
    """The memory that a copy of this rank's part takes."""
    tensors = (v.to_local() if hasattr(v, "to_local") else v for v in state.values() if torch.is_tensor(v))
    return sum(tensor.nbytes for tensor in tensors)


class ShardWriter:
    """Writes one rank's part of model and optimizer, again and again over a run; one at a time. Does nothing where they
    are not divided in DTensors.

    Args:
        trainer: before its first save.
        ranks: those that share its disk.
    Raises:
        UserError: the run folder is not one folder for all processes.
    """

    def __init__(self, trainer: ClmTrainer, ranks: list[int]):
        self.trainer, self.rank, self.ranks = trainer, trainer.args.process_index, ranks
        self.is_used: bool = trainer.is_divided
        self._copy: dict[str, Any] = {}
        self._future: Future | None = None
        if not self.is_used:
            return
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # the ranks' coordination is left out on purpose, so each finds the others' files in the folder
        for message in ("torch.distributed is disabled", "Detected an existing checkpoint"):
            warnings.filterwarnings("ignore", message=message)
        if len(ranks) < dist.get_world_size():
            raise UserError(
                f"The run folder of process {self.rank} is not that of all processes, but each holds a part "
                "of the model (FSDP2, tensor parallelism). Set RUNS_DIR to a shared file system, or use DDP."
            )
        # async_save asks for a group with CPU tensors, which NCCL's is not; nothing is sent over it
        self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        has_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(has_gpu, False, False, has_gpu))  # keeps its memory

    def collect(self) -> dict[str, Any]:
        """What this rank has to write, live."""
        if not self.is_used:
            return {}
        check_copies(self.trainer)
        return collect_shards(self.trainer)

    def start(self, state: dict[str, Any], folder: Path) -> None:
        """Copy `state` to host memory and begin to write it; training may go on when this returns."""
        if not self.is_used:
            return
        from torch.distributed.checkpoint import DefaultSavePlanner, async_save

        self._future = async_save(
            state,
            storage_writer=_writer(folder, self.rank),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=self._group,
            async_stager=self,
            no_dist=True,
            use_collectives=False,
        )

    def take(self, state: dict[str, Any]) -> None:
        """Write the live `state` when `finish` is called: training waits."""
        self._copy = state

    # AsyncStager
    should_synchronize_after_execute = False

    def stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """The copy, kept for another try where the disk is full."""
        self._copy = self._stager.stage(state)
        return self._copy

    def finish(self, folder: Path) -> None:
        """Wait for the writing; what failed is raised, and the next call tries again."""
        if self._future is not None:
            future, self._future = self._future, None
            future.result()
        elif self.is_used:
            write_shards(self._copy, folder, self.rank)

    def join(self, folder: Path, files: Files) -> Files:
        """All parts are there: one .metadata instead of the ranks' own. Returns the manifest's list."""
        if not self.is_used:
            return files
        join_metadata(folder, self.ranks)
        own = {rank_metadata(rank) for rank in self.ranks}
        return {n: f for n, f in files.items() if n not in own} | hash_files(folder, [f"{SHARDED}/{METADATA}"])


def write_shards(state: dict[str, Any], folder: Path, rank: int) -> None:
    """Write a rank's part now."""
    from torch.distributed.checkpoint import DefaultSavePlanner, save

    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(state, storage_writer=_writer(folder, rank), planner=planner, no_dist=True, use_collectives=False)


def _writer(folder: Path, rank: int) -> Any:
    from torch.distributed.checkpoint import FileSystemWriter

    class RankWriter(FileSystemWriter):
        """DCP's, with the names that it gives when ranks write without coordination."""

        def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
            super().set_up_storage_writer(is_coordinator, *args, **{**kwargs, "rank": rank, "use_collectives": False})

    return RankWriter(folder / SHARDED, sync_files=False)  # flushed with the other files of the rank


def rank_metadata(rank: int) -> str:
    """The name of what one rank says of its part."""
    return f"{SHARDED}/__{rank}{METADATA}"


def join_metadata(folder: Path, ranks: list[int]) -> None:
    """Make .metadata from what the ranks say of their parts, and remove those."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    parts = [_read_metadata(folder / rank_metadata(rank)) for rank in ranks]
    whole = parts[0]
    for part in parts[1:]:
        for name, about in part.state_dict_metadata.items():
            known = whole.state_dict_metadata.setdefault(name, about)
            if known is not about and isinstance(about, TensorStorageMetadata):
                known.chunks += about.chunks
        whole.storage_data |= part.storage_data
    with open(folder / SHARDED / METADATA, "wb") as file:
        pickle.dump(whole, file)
    for rank in ranks:
        (folder / rank_metadata(rank)).unlink()


def _read_metadata(path: Path) -> Metadata:
    with open(path, "rb") as file:
        return pickle.load(file)  # its SHA-256 was compared before, as of all files of a checkpoint


def load_shards(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read tensors of a sharded checkpoint into those of `state`, each rank what it holds of them. No collective."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with torch.no_grad():
        load(state, storage_reader=FileSystemReader(checkpoint / SHARDED), planner=planner, no_dist=True)


def load_model(checkpoint: Path, model: torch.nn.Module) -> None:
    """The model's weights from a sharded checkpoint, whether the model itself is divided or not."""
    state = {_MODEL + name: parameter.detach() for name, parameter in model.named_parameters()}
    state |= {_MODEL + name: model.get_buffer(name) for name in persistent_buffers(model)}
    load_shards(checkpoint, state)


def load_optimizer(checkpoint: Path, model: torch.nn.Module, optimizer: Any) -> None:
    """The optimizer's state from a sharded checkpoint; the optimizer may be fresh."""
    optimizer, about = _plain(optimizer), _read_metadata(checkpoint / SHARDED / METADATA).state_dict_metadata
    owners = {name: parameter for name, parameter in model.named_parameters()}
    fused = _fused(optimizer)
    state: dict[str, Any] = {}
    for full_name, facts in about.items():
        if not full_name.startswith(_OPTIMIZER):
            continue
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
        parameter = owners[name]
        if facts.size == parameter.shape:
            value = torch.empty_like(parameter, dtype=facts.properties.dtype, requires_grad=False)
        else:  # a step counter; on the device where the optimizer is fused
            device = parameter.device if parameter in fused else "cpu"
            value = torch.empty(facts.size, dtype=facts.properties.dtype, device=device)
        state[full_name] = optimizer.state.setdefault(parameter, {})[key] = value
    state[_GROUPS] = None
    load_shards(checkpoint, state)
    for group, saved in zip(optimizer.param_groups, state[_GROUPS], strict=True):
        group.update(saved)


def load_plain_optimizer(file: Path, optimizer: Any) -> None:
    """An optimizer.pt, of one process or DDP, into the optimizer of a divided model."""
    optimizer, saved = _plain(optimizer), torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    for group, about in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], about["params"], strict=True):
            for key, value in saved["state"].get(number, {}).items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    own = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                    fill(own, value)
                elif torch.is_tensor(value):
                    own = value.to(parameter.device if group.get("fused") else "cpu", copy=True)
                else:
                    own = value
                optimizer.state.setdefault(parameter, {})[key] = own
        group.update({name: value for name, value in about.items() if name != "params"})


def read_model_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights of a sharded checkpoint, whole, on the CPU of this process."""
    about = _read_metadata(checkpoint / SHARDED / METADATA).state_dict_metadata
    state = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in about.items()
        if name.startswith(_MODEL)
    }
    load_shards(checkpoint, state)
    return {name.removeprefix(_MODEL): value for name, value in state.items()}


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _fused(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    """The parameters that a fused kernel updates; it wants their step counters on the device."""
    return {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
