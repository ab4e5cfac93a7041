"""Reading the blocks of a prepared dataset: a memory map, no copy, no Python list.

In: `data/<dataset>` and a split. Out: token ids by block number, block 0 being the first of shard 0. With block_size 4
and the tokens 10 11 12 13 | 14 15 16 17 in one shard, `read([0, 1])` gives [[10, 11, 12, 13, 14], [14, 15, 16, 17,
-100]]: the last column is the token that follows the block, which the last position predicts.
"""

from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_manifest

NO_TARGET = -100  # the label that the loss ignores (torch's and HF's convention)


class Blocks:
    """One split of a prepared dataset.

    It may have 0 blocks. Survives pickling: shards are opened again when first read.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.split = split
        self.manifest: Manifest = load_manifest(self.folder)
        if split not in self.manifest.splits:
            raise UserError(f"{self.folder}: has no split {split!r}, only {', '.join(self.manifest.splits)}.")
        info = self.manifest.splits[split]
        self.block_size = self.manifest.block_size
        self.dtype = np.dtype(self.manifest.dtype)
        self.num_blocks = info.num_blocks
        self.shard_starts = np.cumsum([0, *(shard.num_blocks for shard in info.shards)], dtype=np.int64)
        self._shards = info.shards
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_blocks

    @property
    def num_tokens(self) -> int:
        """Tokens in the blocks of this split."""
        return self.num_blocks * self.block_size

    def locate(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each block number; any shape, the same shape out (int64).

        Raises:
            IndexError: a number outside [0, num_blocks).
        """
        blocks = np.asarray(blocks, dtype=np.int64)
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self.num_blocks):
            raise IndexError(f"{self.folder}/{self.split} has blocks 0 ... {self.num_blocks - 1}")
        shard = np.searchsorted(self.shard_starts, blocks, side="right") - 1
        return shard, blocks - self.shard_starts[shard]

    def check_files(self) -> None:
        """Every shard is there with its size; says nothing about its bytes, which `data_prep check` reads.

        Raises:
            UserError: names the first file that is missing or has another size.
        """
        for shard in self._shards:
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.num_bytes:
                what = "is missing" if size is None else f"has {size:,} bytes, the manifest says {shard.num_bytes:,}"
                raise UserError(
                    f"{path} {what}. `make check DATASET={self.folder}` names every damaged file; then prepare the "
                    "dataset again."
                )

    def shard_tokens(self, shard: int) -> np.ndarray:
        """The consecutive tokens of one shard: a read-only 1-D view of the memory map, dtype `self.dtype`."""
        if shard not in self._open:
            self._open[shard] = self._map(shard)
        return self._open[shard]

    def read(self, blocks: np.ndarray) -> np.ndarray:
        """Blocks with the token after each: int64 (len(blocks), block_size + 1); -100 after a shard's last block."""
        blocks = np.asarray(blocks, dtype=np.int64).reshape(-1)
        shards, rows = self.locate(blocks)
        out = np.empty((len(blocks), self.block_size + 1), dtype=np.int64)
        for shard in np.unique(shards):
            tokens = self.shard_tokens(int(shard))
            here = np.flatnonzero(shards == shard)
            first = rows[here] * self.block_size
            out[here, :-1] = tokens.reshape(-1, self.block_size)[rows[here]]
            after = first + self.block_size
            is_inside = after < len(tokens)
            out[here, -1] = np.where(is_inside, tokens[np.where(is_inside, after, 0)].astype(np.int64), NO_TARGET)
        return out

    def token_at(self, positions: np.ndarray) -> np.ndarray:
        """The tokens at positions of the split's token stream, in [0, num_tokens); int64, the shape of `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        shards, _ = self.locate(positions // self.block_size)
        out = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self.shard_tokens(int(shard))[positions[here] - self.shard_starts[shard] * self.block_size]
        return out

    def close_before(self, position: int) -> None:
        """Close the memory maps of all shards that end at or before a position: who reads in order holds one or two."""
        ends = self.shard_starts[1:] * self.block_size
        self._open = {shard: tokens for shard, tokens in self._open.items() if ends[shard] > position}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def _map(self, shard: int) -> np.ndarray:
        import pyarrow as pa

        info = self._shards[shard]
        path = self.folder / info.file
        try:
            if path.stat().st_size != info.num_bytes:
                raise ValueError(f"it has {path.stat().st_size:,} bytes, the manifest says {info.num_bytes:,}")
            column = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch().column("input_ids")
            tokens = column.values.to_numpy(zero_copy_only=True)
            if tokens.dtype != self.dtype or len(tokens) != info.num_blocks * self.block_size:
                raise ValueError(f"it holds {len(tokens):,} tokens of {tokens.dtype}, the manifest says otherwise")
        except (OSError, ValueError, KeyError, StopIteration) as error:  # pa.ArrowInvalid is a ValueError
            raise UserError(
                f"{path} is missing or damaged: {error}. Nothing can be read from it. "
                f"`make check DATASET={self.folder}` names every damaged file; then prepare the dataset again."
            ) from error
        return tokens
