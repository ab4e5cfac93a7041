"""Reading the blocks of a prepared dataset: a memory map, no copy, no Python list.

In: `data/<dataset>` and a split. Out: token ids by block number, block 0 being the first of shard 0. With block_size 4
and the tokens 10 11 12 13 | 14 15 16 17 in one shard, `read([0, 1])` gives [[10, 11, 12, 13, 14], [14, 15, 16, 17,
-100]]: the last column is the token that follows the block, which the last position predicts. Where documents are
packed (data_prep/packing.py) a block has its own length and nothing follows it: with the tokens 10 11 12 13 | 14 15 . .
in two blocks, `read([0, 1])` gives [[10, 11, 12, 13, -100], [14, 15, -100, -100, -100]].
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Manifest, fill_token_id, load_manifest
from data_prep.packing import CONCAT
from data_prep.paths import check_command

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
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return self.num_blocks

    @property
    def num_tokens(self) -> int:
        """Positions in the blocks of this split, those of padding included."""
        return self.num_blocks * self.block_size

    @property
    def is_padded(self) -> bool:
        """Whether blocks have lengths of their own."""
        return self.manifest.packing != CONCAT

    @property
    def padding_fraction(self) -> float:
        """The share of the positions that is padding."""
        return self.manifest.splits[self.split].num_padding_tokens / max(1, self.num_tokens)

    @property
    def fill_token_id(self) -> int:
        """What padding is written as. A token of the text may have the same id."""
        return fill_token_id(self.manifest.tokenizer)

    def lengths_of(self, blocks: np.ndarray) -> np.ndarray:
        """Tokens of each of these blocks without padding; int64, the shape of `blocks`."""
        blocks = np.asarray(blocks, dtype=np.int64)
        if not self.is_padded:
            return np.full(blocks.shape, self.block_size)
        if self._lengths is None:
            self._lengths = self._map_lengths()
        return self._lengths[blocks].astype(np.int64)

    def is_text(self, positions: np.ndarray) -> np.ndarray:
        """Whether the tokens at these positions are text and separators, not padding; bool."""
        block, offset = np.divmod(np.asarray(positions, dtype=np.int64), self.block_size)
        return offset < self.lengths_of(block)

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
                    f"{path} {what}. {check_command(self.folder)} names every damaged file; then prepare the "
                    "dataset again."
                )
        self.lengths_of(np.empty(0))

    def shard_tokens(self, shard: int) -> np.ndarray:
        """The consecutive tokens of one shard: a read-only 1-D view of the memory map, dtype `self.dtype`."""
        return self._opened(shard)[0]

    def read(self, blocks: np.ndarray) -> np.ndarray:
        """Blocks with the token after each: int64 (len(blocks), block_size + 1).

        NO_TARGET (-100) after a shard's last block; of padded blocks, for padding and in the last column.
        """
        tokens, targets = self._read(blocks)
        return tokens if targets is None else np.concatenate([tokens[:, :1], targets], axis=1)

    def read_rows(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks and the token that follows each position, as a model takes them: both int64 (n, block_size).

        What is no target is NO_TARGET, as in `read`; padding among the inputs is what it is in the file.
        """
        tokens, targets = self._read(blocks)
        return tokens[:, :-1], tokens[:, 1:] if targets is None else targets

    def _read(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        blocks = np.asarray(blocks, dtype=np.int64).reshape(-1)
        shards, numbers = self.locate(blocks)
        rows = {shard: self.shard_rows(shard) for shard in set(shards.tolist())}
        tokens = copy_rows(rows, shards, numbers, self.block_size)
        tokens[self.nothing_follows(shards, numbers), -1] = NO_TARGET
        return tokens, self.targets(tokens, blocks)

    def nothing_follows(self, shards: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Whether a block, as `locate` found it, is the last one of its shard; bool."""
        return self.shard_starts[shards] + numbers + 1 == self.shard_starts[shards + 1]

    def shard_rows(self, shard: int) -> np.ndarray:
        """The blocks of one shard, each with the token that follows it: a read-only view of the memory map, (n, P + 1).

        Rows overlap by a token. The last one reaches one token into the end-of-stream marker that Arrow writes behind
        the tokens: nothing follows it.
        """
        return self._opened(shard)[1]

    def targets(self, tokens: np.ndarray, blocks: np.ndarray) -> np.ndarray | None:
        """The targets of padded blocks, int64 (n, block_size); None where each is the next of `tokens`."""
        if not self.is_padded:
            return None
        targets, lengths = tokens[:, 1:].copy(), self.lengths_of(blocks)
        targets[:, -1] = NO_TARGET
        short = np.flatnonzero(lengths < self.block_size)  # few, as a rule
        is_target = np.arange(1, self.block_size + 1) < lengths[short, None]
        targets[short] = np.where(is_target, targets[short], NO_TARGET)
        return targets

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
        self._open = {shard: opened for shard, opened in self._open.items() if ends[shard] > position}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}, "_lengths": None}

    def _opened(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._open:
            self._open[shard] = self._map(shard)
        return self._open[shard]

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        import pyarrow as pa

        from data_prep.arrays import to_numpy

        info = self._shards[shard]
        path = self.folder / info.file
        try:
            if path.stat().st_size != info.num_bytes:
                raise ValueError(f"it has {path.stat().st_size:,} bytes, the manifest says {info.num_bytes:,}")
            file = pa.memory_map(str(path)).read_buffer()
            column = pa.ipc.open_stream(file).read_next_batch().column("input_ids")
            tokens = to_numpy(column.values)
            if tokens.dtype != self.dtype or len(tokens) != info.num_blocks * self.block_size:
                raise ValueError(f"it holds {len(tokens):,} tokens of {tokens.dtype}, the manifest says otherwise")
            offset = tokens.ctypes.data - file.address if len(tokens) else 0
            strides = (self.block_size * tokens.itemsize, tokens.itemsize)
            rows: np.ndarray = np.ndarray((info.num_blocks, self.block_size + 1), self.dtype, file, offset, strides)
        except (OSError, ValueError, KeyError, StopIteration) as error:  # pa.ArrowInvalid is a ValueError
            raise UserError(
                f"{path} is missing or damaged: {error}. Nothing can be read from it. "
                f"{check_command(self.folder)} names every damaged file; then prepare the dataset again."
            ) from error
        return tokens, rows

    def _map_lengths(self) -> np.ndarray:
        path = lengths_path(self.folder, self.split)
        try:
            lengths = np.load(path, mmap_mode="r" if self.num_blocks else None)
            if lengths.dtype != np.uint32 or lengths.shape != (self.num_blocks,):
                raise ValueError(f"it holds {lengths.dtype} {lengths.shape}, not {self.num_blocks:,} lengths")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} is missing or damaged: {error}. Without it padding cannot be told from text. "
                f"{check_command(self.folder)} names every damaged file; then prepare the dataset again."
            ) from error
        return lengths


def copy_rows(rows: Mapping[int, np.ndarray], shards: np.ndarray, numbers: np.ndarray, block_size: int) -> np.ndarray:
    """Rows `numbers` of `Blocks.shard_rows` of `shards`, copied: int64 (n, block_size + 1).

    Args:
        rows: `shard_rows` by what `shards` calls them.
    """
    if not len(shards):
        return np.empty((0, block_size + 1), dtype=np.int64)
    wanted = [rows[shard][number] for shard, number in zip(shards.tolist(), numbers.tolist(), strict=True)]
    # joining bytes has less to do for each row than np.concatenate
    return np.frombuffer(b"".join(wanted), wanted[0].dtype).astype(np.int64).reshape(-1, block_size + 1)


def lengths_path(folder: Path, split: str) -> Path:
    """Where the lengths of a split's blocks lie (uint32, one for each); not there for `concat`."""
    return folder / split / "lengths.npy"
