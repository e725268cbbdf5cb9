"""Which tile sizes the Triton kernels are launched with: rules measured by bench/gpu/kernels.py, no search at start.

The rules go by shape class, so that an unknown model or card gets something sensible.
"""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Decode:
    block_n: int
    splits: int
    smallest: int  # keys that are worth a program
    stages: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class Prefill:
    block_m: int
    block_n: int
    stages: int
    num_warps: int


def power_of_two(n: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def one_row(N: int, K: int, gated: bool, multiprocessors: int) -> OneRow:
    block_k = min(power_of_two(K, 16), 1024)
    block_n = 8 if not gated else 4
    while block_n > 1 and block_n * 2 * multiprocessors > N:
        block_n //= 2
    return OneRow(block_n, block_k, 4)


def few_rows(M: int, N: int, K: int, gated: bool, multiprocessors: int) -> FewRows:
    """Enough programs for every multiprocessor: by narrower tiles first, then by splitting K."""
    block_m = power_of_two(M, 16)
    block_n = 32 if block_m == 16 else 64
    if gated and block_n > 32:
        block_n = 32
    block_k = 128 if block_m >= 32 else 256
    block_k = min(block_k, power_of_two(K, 16))
    splits = 1
    tiles = -(-N // block_n)
    while tiles * splits < 2 * multiprocessors and splits < 8 and block_k * 4 * splits <= K:
        splits *= 2
    return FewRows(block_m, block_n, block_k, splits, 4, 4, False, 256)


def decode(pairs: int, D: int, multiprocessors: int, max_kv_len: int) -> Decode:
    """``pairs``: sequences times KV heads. More splits than the longest sequence can use only cost launches."""
    block_n = 64 if D <= 128 else 32
    splits = 1
    while pairs * splits < 4 * multiprocessors and splits < 64 and splits * block_n < max_kv_len:
        splits *= 2
    return Decode(block_n, splits, block_n, 3, 4)


def prefill(D: int, itemsize: int) -> Prefill:
    if itemsize == 4:
        return Prefill(32, 32, 2, 4)
    if D > 128:
        return Prefill(64, 64, 2, 4)
    return Prefill(128, 64, 3, 8)


def fresh(D: int) -> Prefill:
    if D > 128:
        return Prefill(128, 64, 2, 8)
    return Prefill(128, 128, 2, 8)
