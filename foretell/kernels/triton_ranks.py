"""Sums over the GPUs of one host through each other's memory.

Every rank has an inbox that the others write to. For few rows a number travels with each word of 4 bytes, in one
store of 8: who waits for the word waits for nothing else, no fence and no second trip (the idea of NCCL's LL
protocol). For more, words travel alone, and one number follows when all of a program's are there. The number, an
epoch, grows by one with each sum and lives on the device, so that a captured graph counts on. Two halves of the inbox
take turns: who writes into one of them has had the others' words of the sum between, so they are done with it.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, wait_for_inputs


@triton.jit
def _send(words, peers_ptr, at, inside, epoch, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """Our words into our part of every other rank's inbox."""
    numbered = (epoch.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF)
    half = (epoch & 1).to(tl.int64) * SIZE * ROOM
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(inbox + half + RANK * ROOM + at, numbered, mask=inside)


@triton.jit
def _receive(peers_ptr, at, inside, epoch, SENDER: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
             ROOM: tl.constexpr):  # fmt: skip
    """The words of another rank, once they are there."""
    inbox = tl.load(peers_ptr + RANK).to(tl.pointer_type(tl.int64))
    ptrs = inbox + (epoch & 1).to(tl.int64) * SIZE * ROOM + SENDER * ROOM + at
    got = tl.load(ptrs, mask=inside, other=0, volatile=True)
    while tl.sum((inside & ((got >> 32).to(tl.int32) != epoch)).to(tl.int32), axis=0) > 0:
        got = tl.load(ptrs, mask=inside, other=0, volatile=True)
    return got.to(tl.int32)


@triton.jit
def _low(words, DTYPE: tl.constexpr):
    """The first number of each word; DTYPE has 16 or 32 bits."""
    if DTYPE.primitive_bitwidth == 32:
        return words.to(DTYPE, bitcast=True)
    else:
        return (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(words, DTYPE: tl.constexpr):
    """The second number of each word of two."""
    return (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _packed(low, high, DTYPE: tl.constexpr):
    """Two numbers as one word, rounded."""
    first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return first | (high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _count(state_ptr, epoch):
    """The last program of a sum begins the next epoch."""
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1) == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, epoch + 1)


@triton.jit
def _summed(own, peers_ptr, at, inside, epoch, DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
            ROOM: tl.constexpr):  # fmt: skip
    """(first, second) numbers of all ranks' words, added up in the order of the ranks: on all the same bits."""
    low = tl.zeros(own.shape, tl.float32)
    high = tl.zeros(own.shape, tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:  # noqa: SIM108  known when it is compiled: only one of both is
            words = own
        else:
            words = _receive(peers_ptr, at, inside, epoch, rank, RANK, SIZE, ROOM)
        low += _low(words, DTYPE)
        if DTYPE.primitive_bitwidth == 16:
            high += _high(words, DTYPE)
    return low, high


@triton.jit
def sum_ranks(
    x_ptr, y_ptr, peers_ptr, state_ptr, words,
    DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x, ``words`` words of int32 that hold numbers of DTYPE, summed over the ranks → y. All programs must run at
    once: each sends all that is its to send before it waits. state: the epoch, and programs that are done."""
    let_next_start(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(words, BLOCK)
    wait_for_inputs(PDL)
    epoch = tl.load(state_ptr)
    for block in range(program, blocks, programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        own = tl.load(x_ptr + at, mask=inside, other=0)
        _send(own, peers_ptr, at, inside, epoch, RANK, SIZE, ROOM)
    tl.debug_barrier()  # no store moves behind the waiting
    for block in range(program, blocks, programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        own = tl.load(x_ptr + at, mask=inside, other=0)
        low, high = _summed(own, peers_ptr, at, inside, epoch, DTYPE, RANK, SIZE, ROOM)
        if DTYPE.primitive_bitwidth == 32:
            tl.store(y_ptr + at, low.to(tl.int32, bitcast=True), mask=inside)
        else:
            tl.store(y_ptr + at, _packed(low, high, DTYPE), mask=inside)
    _count(state_ptr, epoch)


@triton.jit
def _put(words, peers_ptr, at, inside, half, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr):
    """Our words as they are into our part of every other rank's inbox."""
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int32))
            tl.store(inbox + (half + RANK) * ROOM + at, words, mask=inside)


@triton.jit
def _meet(flags_ptr, epoch, half, RANK: tl.constexpr, SIZE: tl.constexpr, FLAGS: tl.constexpr):
    """Tell the same program of every other rank that our words are there, and wait until it says so of its own."""
    program = tl.program_id(0)
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32)) + (half + RANK) * FLAGS + program
            tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flag = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + (half + peer) * FLAGS + program
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") != epoch:
                pass
    tl.debug_barrier()


@triton.jit
def _gathered(own, peers_ptr, at, inside, half, DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
              ROOM: tl.constexpr):  # fmt: skip
    """As ``_summed``, of words that are there."""
    inbox = tl.load(peers_ptr + RANK).to(tl.pointer_type(tl.int32))
    low = tl.zeros(own.shape, tl.float32)
    high = tl.zeros(own.shape, tl.float32)
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            words = own
        else:
            words = tl.load(inbox + (half + rank) * ROOM + at, mask=inside, other=0, cache_modifier=".cg")
        low += _low(words, DTYPE)
        if DTYPE.primitive_bitwidth == 16:
            high += _high(words, DTYPE)
    return low, high


@triton.jit
def sum_many(
    x_ptr, y_ptr, peers_ptr, flags_ptr, state_ptr, words,
    DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``sum_ranks`` for many words: peers and flags are addresses of each rank's inbox (int32) and of its flags, of
    which a program has one for each half and sender. Ranks have as many programs, at most FLAGS."""
    let_next_start(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(words, BLOCK)
    wait_for_inputs(PDL)
    epoch = tl.load(state_ptr)
    half = (epoch & 1).to(tl.int64) * SIZE
    for block in range(program, blocks, programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(x_ptr + at, mask=at < words, other=0)
        _put(own, peers_ptr, at, at < words, half, RANK, SIZE, ROOM)
    _meet(flags_ptr, epoch, half, RANK, SIZE, FLAGS)
    for block in range(program, blocks, programs):
        at = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(x_ptr + at, mask=at < words, other=0)
        low, high = _gathered(own, peers_ptr, at, at < words, half, DTYPE, RANK, SIZE, ROOM)
        if DTYPE.primitive_bitwidth == 32:
            tl.store(y_ptr + at, low.to(tl.int32, bitcast=True), mask=at < words)
        else:
            tl.store(y_ptr + at, _packed(low, high, DTYPE), mask=at < words)
    _count(state_ptr, epoch)


@triton.jit
def _add_and_norm(
    y, x, weight_low, weight_high, normed_ptr, sum_ptr, at, inside, C, eps, DTYPE: tl.constexpr
):  # fmt: skip
    """One row as words: sum = x + y, and its norm, each rounded to DTYPE."""
    total = _packed(_low(x, DTYPE) + _low(y, DTYPE), _high(x, DTYPE) + _high(y, DTYPE), DTYPE)
    tl.store(sum_ptr + at, total, mask=inside)
    low, high = _low(total, DTYPE), _high(total, DTYPE)
    scale = tl.rsqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / C + eps)
    tl.store(normed_ptr + at, _packed(low * scale * weight_low, high * scale * weight_high, DTYPE), mask=inside)


@triton.jit
def sum_add_norm_many(
    y_ptr, x_ptr, weight_ptr, normed_ptr, sum_ptr, peers_ptr, flags_ptr, state_ptr, rows, C, eps,
    DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``sum_add_norm`` for many rows, as ``sum_many`` does it; every program has several rows."""
    let_next_start(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    w = tl.arange(0, BLOCK)
    inside = w < C // 2
    weight_low = tl.load(weight_ptr + 2 * w, mask=inside, other=0.0)
    weight_high = tl.load(weight_ptr + 2 * w + 1, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    epoch = tl.load(state_ptr)
    half = (epoch & 1).to(tl.int64) * SIZE
    for row in range(program, rows, programs):
        at = row * (C // 2) + w  # all of them fit in an inbox
        own = tl.load(y_ptr + at, mask=inside, other=0)
        _put(own, peers_ptr, at, inside, half, RANK, SIZE, ROOM)
    _meet(flags_ptr, epoch, half, RANK, SIZE, FLAGS)
    for row in range(program, rows, programs):
        at = row * (C // 2) + w  # all of them fit in an inbox
        own = tl.load(y_ptr + at, mask=inside, other=0)
        x = tl.load(x_ptr + at, mask=inside, other=0)
        low, high = _gathered(own, peers_ptr, at, inside, half, DTYPE, RANK, SIZE, ROOM)
        y = _packed(low, high, DTYPE)
        _add_and_norm(y, x, weight_low, weight_high, normed_ptr, sum_ptr, at, inside, C, eps, DTYPE)
    _count(state_ptr, epoch)


@triton.jit
def sum_add_norm(
    y_ptr, x_ptr, weight_ptr, normed_ptr, sum_ptr, peers_ptr, state_ptr, C, eps,
    DTYPE: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row of C numbers of 16 bits a program: sum = x + (y summed over the ranks), each rounded to DTYPE, and
    normed = rms_norm(sum). Rows are words of int32, C/2 ≤ BLOCK; as few programs as run at once."""
    let_next_start(PDL)
    w = tl.arange(0, BLOCK)
    inside = w < C // 2
    at = tl.program_id(0).to(tl.int64) * (C // 2) + w
    weight_low = tl.load(weight_ptr + 2 * w, mask=inside, other=0.0)
    weight_high = tl.load(weight_ptr + 2 * w + 1, mask=inside, other=0.0)
    wait_for_inputs(PDL)
    epoch = tl.load(state_ptr)
    own = tl.load(y_ptr + at, mask=inside, other=0)
    _send(own, peers_ptr, at, inside, epoch, RANK, SIZE, ROOM)
    x = tl.load(x_ptr + at, mask=inside, other=0)
    tl.debug_barrier()
    low, high = _summed(own, peers_ptr, at, inside, epoch, DTYPE, RANK, SIZE, ROOM)
    y = _packed(low, high, DTYPE)
    _add_and_norm(y, x, weight_low, weight_high, normed_ptr, sum_ptr, at, inside, C, eps, DTYPE)
    _count(state_ptr, epoch)
