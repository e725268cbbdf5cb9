"""Which tile sizes the Triton kernels are launched with: rules measured by bench/gpu/kernels.py, no search at start.

The rules go by shape class, so that an unknown model or card gets something sensible. Figures in comments: an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class OneRow:
    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class FewRows:
    block_m: int
    block_n: int
    block_k: int
    splits: int
    stages: int
    num_warps: int
    weights_first: bool
    ahead: int  # elements of a weight row asked for before the inputs are there
    masked: bool = False  # rows of a tile that there are not: zeros, instead of others once more

    def fitted(self, gated: bool, shared_bytes: int) -> FewRows:
        """With as many stages as the device's shared memory holds."""
        stage = 2 * self.block_k * (self.block_m + self.block_n * (2 if gated else 1))
        return replace(self, stages=max(1, min(self.stages, shared_bytes // stage)))


@dataclass(frozen=True, slots=True)
class Gated:
    block_m: int
    block_n: int  # of gate, and as many of up
    block_k: int
    group: int  # rows of tiles that are worked on together
    stages: int
    num_warps: int


GATED = Gated(128, 128, 64, 4, 4, 8)


@dataclass(frozen=True, slots=True)
class Decode:
    block_n: int
    splits: int
    smallest: int  # keys that are worth a program
    stages: int
    num_warps: int
    ahead: int  # tiles of keys asked for before the inputs are there

    def wide(self) -> Decode:
        """For float32: tiles that shared memory holds."""
        return replace(self, block_n=32, stages=2)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Of triton_lanes: a thread has 4 rows of 8 numbers, of keys and of values, and may use so many registers."""

    block_n: int
    splits: int
    smallest: int
    num_warps: int = 2
    registers: int = 128


@dataclass(frozen=True, slots=True)
class Prefill:
    block_m: int
    block_n: int
    stages: int
    num_warps: int


def power_of_two(n: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def one_row(N: int, K: int, gated: bool, multiprocessors: int) -> OneRow | None:
    """A program keeps 16 KiB of loads open, as many rows as that takes: 4.6 TB/s on a large head. None: a K that
    powers of two fit badly is better off with the tiles of ``few_rows``, unless the layer is small."""
    waste = power_of_two(K) - K if K < 2048 else -K % 2048
    if waste * 4 > K and N * K * (4 if gated else 2) > 48 << 20:
        return None
    if K < 2048:
        if gated and waste * 4 > K:
            return OneRow(16, 256, 4)
        return OneRow(8 if gated else 4, power_of_two(K, 16), 4)
    if gated:
        return OneRow(2, 2048, 4)
    if K > 2048 and 16 * multiprocessors >= N:  # few and long
        return OneRow(1, 4096, 4) if 8 * multiprocessors >= N else OneRow(2, 2048, 8)
    return OneRow(4, 2048, 4)


SMALL_WEIGHT = 16 << 20  # bytes: read in so little time that it is latency that counts


def most_rows(N: int, K: int) -> int:
    """Rows up to which our kernels are as fast as the library's, for a weight of N rows."""
    return 256 if 2 * N * K <= SMALL_WEIGHT else 64


def few_rows(M: int, N: int, K: int, gated: bool, multiprocessors: int) -> FewRows:
    """Weights as the wgmma operand of 64 rows; K split until nearly every multiprocessor has a program."""
    block_m, tiles = 32 if M <= 32 else 64, -(-N // 64)  # 16 rows are no faster than 32, but one more compilation
    if 2048 <= K <= 8192 and 2 * N * K <= 8 << 20 and not gated and block_m <= 32:
        # a small layer: each program has one tile of it in registers before the inputs come
        return FewRows(block_m, 32, 512, -(-K // 512), 1, 4, False, 64)
    if N * K * (4 if gated else 2) <= SMALL_WEIGHT:
        return _few_rows_small(M, N, K, gated, block_m, multiprocessors)
    if gated:
        return FewRows(block_m, 64, 128, 1, 4, 4, True, 256)
    if tiles >= 4 * multiprocessors:
        return FewRows(block_m, 128, 128, 1, 4, 8, True, 256)
    splits = 1
    while tiles * splits * 2 <= 1.2 * multiprocessors and 1024 * splits <= K and splits < 8:
        splits *= 2
    return FewRows(block_m, 64, 128, splits, 6, 4, True, 256)


def _few_rows_small(M: int, N: int, K: int, gated: bool, block_m: int, multiprocessors: int) -> FewRows:
    """Tiles of which each multiprocessor gets one at most, as much on the way as shared memory holds."""
    row_tiles = -(-M // block_m)
    widths = (64,) if M <= 32 else (32, 64)
    fitting = [n for n in widths if row_tiles * -(-N // n) <= multiprocessors]
    if not fitting and M > 128:
        return FewRows(128, 64, 64 if gated else 128, 1, 4, 4, True, 256)
    block_n = fitting[0] if fitting else 64
    programs, splits, least = row_tiles * -(-N // block_n), 1, 1024 if M <= 32 else 512
    while programs * splits * 2 <= 1.2 * multiprocessors and least * splits < K and splits < 8 and not gated:
        splits *= 2
    return FewRows(block_m, block_n, 128, splits, 4 if gated else 6, 4, block_n == 64, 256)


def invariant(N: int, gated: bool, itemsize: int) -> FewRows:
    """One way to sum for any number of rows: tiles and steps that do not depend on it. Most rows of a tile may not be
    there: a single one in place of all would be asked for 64 times by every program."""
    if itemsize == 4:
        return FewRows(32, 32, 32, 1, 2, 4, False, 64, masked=True)
    return FewRows(64, 64 if gated or N < 16384 else 128, 64, 1, 4, 4, True, 128, masked=True)


def decode(pairs: int, D: int, multiprocessors: int, max_kv_len: int) -> Decode:
    """``pairs``: sequences times KV heads. A launch is for all lengths: programs without keys leave at once, and each
    has keys enough to be worth the merging of parts."""
    tile = 64 if D <= 128 else 32
    if pairs > 2 * multiprocessors:  # several to a multiprocessor, as their lengths differ; the longest are halved
        return Decode(tile, 2, 1024, 3, 4, 1)
    if pairs >= multiprocessors:
        return Decode(tile, 1, 64, 3, 8, 1)
    splits = 1
    while pairs * splits < 2 * multiprocessors and splits < 32 and splits * 64 < max_kv_len:
        splits *= 2
    if splits <= 8 and max_kv_len > 256:  # several sequences: 25 µs, not 33, for 16 of 200 to 2000 tokens
        return Decode(64, 4, 256, 3, 4, 1)
    return Decode(64, splits, 64, 2, 8, 1)


def lanes(pairs: int, block_d: int, multiprocessors: int) -> Lanes | None:
    """For MHA, where all pairs of a sequence and a head fit on the card at once: 36 µs, not 43, for 32 times 32 of
    256 tokens. None: fewer or more are faster in tiles."""
    if block_d > 128 or not 4 * multiprocessors <= pairs <= 8 * multiprocessors:
        return None
    return Lanes(2048 // block_d, 2, 1024)


def prefill(D: int, itemsize: int, shared_bytes: int) -> Prefill:
    if itemsize == 4 or shared_bytes < 128 << 10:
        return Prefill(32, 32, 2, 4)
    if D > 128:
        return Prefill(64, 64, 2, 4)
    return Prefill(128, 128, 2, 8)


def fresh(D: int) -> Prefill:
    """For Hopper and later only."""
    if D > 128:
        return Prefill(128, 64, 2, 8)
    return Prefill(128, 128, 3, 8)
