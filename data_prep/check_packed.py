"""Recount a split whose documents are packed: every token of every document lies in exactly one place.

In: blocks with lengths, the piece map and the document map. Out: a list of what does not hold, each naming its file.
"""

import numpy as np

from data_prep.arrays import to_numpy
from data_prep.blocks import Blocks, lengths_path
from data_prep.documents import DocumentMap
from data_prep.pieces import pieces_path


def check_packed(blocks: Blocks, documents: DocumentMap) -> list[str]:
    """Compare blocks, lengths, pieces and documents of one split with each other and with the manifest."""
    info, size = blocks.manifest.splits[blocks.split], blocks.block_size
    lengths = blocks.lengths_of(np.arange(blocks.num_blocks))
    where = lengths_path(blocks.folder, blocks.split)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= size:
        return [f"{where}: holds lengths of {lengths.min()} to {lengths.max()} for blocks of {size:,}"]
    problems = []
    counted = int(lengths.sum()), int(size * blocks.num_blocks - lengths.sum())
    if counted != (info.num_tokens, info.num_padding_tokens):
        problems.append(
            f"{where}: its blocks hold {counted[0]:,} tokens and {counted[1]:,} of padding but the manifest says "
            f"{info.num_tokens:,} and {info.num_padding_tokens:,}"
        )
    return problems + _check_pieces(blocks, documents, lengths) + _check_padding(blocks, lengths)


def _check_pieces(blocks: Blocks, documents: DocumentMap, lengths: np.ndarray) -> list[str]:
    info, tokenizer, size = blocks.manifest.splits[blocks.split], blocks.manifest.tokenizer, blocks.block_size
    where = pieces_path(blocks.folder, blocks.split)
    starts = to_numpy(documents.first_tokens).astype(np.int64)
    next_token = next_block = 0
    num_eos = num_bos = 0
    for position, token, length in documents.piece_map.windows():
        block, offset = np.divmod(position, size)
        is_new = np.diff(block, prepend=next_block - 1) > 0
        if (length < 1).any() or not np.array_equal(block[is_new], next_block + np.arange(is_new.sum())):
            return [f"{where}: its pieces do not lie in the blocks one after the other"]
        ends = np.append(np.flatnonzero(is_new)[1:] - 1, len(block) - 1)
        in_front = np.where(is_new, 0, np.append(0, (offset + length)[:-1]))
        if not np.array_equal(offset, in_front) or not np.array_equal((offset + length)[ends], lengths[block[ends]]):
            return [f"{where}: its pieces do not fill the blocks"]
        order = np.argsort(token)
        if not np.array_equal(token[order], next_token + np.cumsum(length[order]) - length[order]):
            return [f"{where}: its pieces are not all tokens of the documents once"]
        next_token, next_block = next_token + int(length.sum()), int(block[-1]) + 1
        is_first = starts[np.minimum(np.searchsorted(starts, token), len(starts) - 1)] == token
        stop = token + length
        is_last = (stop == info.num_tokens) | (
            starts[np.minimum(np.searchsorted(starts, stop), len(starts) - 1)] == stop
        )
        num_eos += int((blocks.token_at(position[is_last] + length[is_last] - 1) == tokenizer.eos_token_id).sum())
        num_bos += int((blocks.token_at(position[is_first]) == tokenizer.bos_token_id).sum())
    if (next_token, next_block) != (info.num_tokens, blocks.num_blocks):
        return [f"{where}: its pieces are {next_token:,} tokens in {next_block:,} blocks, not {info.num_tokens:,}"]
    problems = []
    for name, found, is_wanted in (("end", num_eos, True), ("begin", num_bos, tokenizer.is_bos_written)):
        if is_wanted and found != info.num_documents:
            problems.append(
                f"{blocks.folder}/{blocks.split}: {found:,} documents {name} where the piece map says, with their "
                f"control token, but there are {info.num_documents:,}"
            )
    return problems


def _check_padding(blocks: Blocks, lengths: np.ndarray) -> list[str]:
    """Ids are in the vocabulary, padding is written as one id, and control tokens are as many as documents."""
    info, tokenizer, size = blocks.manifest.splits[blocks.split], blocks.manifest.tokenizer, blocks.block_size
    where = f"{blocks.folder}/{blocks.split}"
    num_eos = num_bos = largest = num_wrong = 0
    for shard in range(len(info.shards)):
        tokens = blocks.shard_tokens(shard).reshape(-1, size)
        first = int(blocks.shard_starts[shard])
        is_text = np.arange(size) < lengths[first : first + len(tokens), None]
        text = tokens[is_text]
        num_wrong += int(np.count_nonzero(tokens[~is_text] != blocks.fill_token_id))
        num_eos += int(np.count_nonzero(text == tokenizer.eos_token_id))
        num_bos += int(np.count_nonzero(text == tokenizer.bos_token_id)) if tokenizer.is_bos_written else 0
        largest = max(largest, int(tokens.max(initial=0)))
    problems = []
    if largest >= tokenizer.vocab_size:
        problems.append(f"{where}: holds token {largest} but the vocabulary has {tokenizer.vocab_size:,}")
    if num_wrong:
        problems.append(f"{where}: {num_wrong:,} positions of padding hold another id than {blocks.fill_token_id}")
    is_one_id = tokenizer.is_bos_written and tokenizer.bos_token_id == tokenizer.eos_token_id
    for name, found, is_wanted in (("EOS", num_eos, True), ("BOS", num_bos, tokenizer.is_bos_written)):
        expected = info.num_documents * (1 + is_one_id) if is_wanted else 0
        if found != expected:
            problems.append(f"{where}: has {found:,} {name} but there are {info.num_documents:,} documents")
    return problems
