"""The Triton kernels at a step's ends, against plain torch: on a GPU, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

import os
import random

import pytest
import torch

from foretell.config import SchedulerConfig
from foretell.worker.step_buffers import StepBuffers, step_layout, unpack_torch
from foretell.worker.step_ends import Unpack, greedy_torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from foretell.kernels.triton_step import greedy_triton, unpack_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
CONFIG = SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=700, max_model_len=9000, block_size=4)


def filled(seed: int) -> StepBuffers:
    buffers = StepBuffers(CONFIG, (50, 60), 1000, DEVICE, in_flight=1)
    rng = random.Random(seed)
    for table in buffers.resident:
        table.copy_(torch.tensor([[rng.randrange(1000) for _ in range(table.shape[1])] for _ in table]))
    buffers.last_token.copy_(torch.tensor([rng.randrange(-1, 1000) for _ in range(10)]))
    for out in (buffers.token_ids, buffers.positions, buffers.kv_lens, *buffers.kv_slots, *buffers.tables):
        out.fill_(-7)
    return buffers


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 1, 300, 1, 257], [1, 4, 1, 1, 1, 1, 2, 1, 1]])
def test_unpacking_equals_torch(lengths: list[int]) -> None:
    rng = random.Random(sum(lengths))
    layout = step_layout(len(lengths), sum(lengths), 2)
    starts = [rng.choice([0, 3, 4, 31, 2100]) for _ in lengths]
    slots = rng.sample(range(10), len(lengths))
    query_starts = [0]
    for length in lengths:
        query_starts.append(query_starts[-1] + length)
    made = []
    words = None
    for unpack in (unpack_torch, unpack_triton):
        buffers = filled(4)
        if words is None:
            words = buffers.staging_host[0].numpy()
            words[layout.slots], words[layout.starts], words[layout.query_starts] = slots, starts, query_starts
            words[layout.tokens] = [rng.randrange(-1, 1000) for _ in range(sum(lengths))]
            at, num_new = 0, []
            for group in range(2):
                first, ends = [], [at]
                for start, length in zip(starts, lengths, strict=True):
                    need = -(-(start + length) // 4)
                    have = min(need, -(-start // 4)) if rng.random() < 0.7 else 0
                    first.append(have)
                    ends.append(ends[-1] + need - have)
                words[layout.first_new[group]], words[layout.new_starts[group]] = first, ends
                num_new.append(ends[-1] - at)
                at = ends[-1]
            words[layout.new_blocks : layout.new_blocks + at] = [rng.randrange(1000) for _ in range(at)]
        buffers.staging_host[0].numpy()[:] = words
        buffers.send(0, len(words))
        unpack(buffers, layout, max(lengths), num_new)
        made.append(buffers)
    ours, theirs = made[1], made[0]
    total, count = sum(lengths), len(lengths)
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.positions, theirs.positions)
    assert torch.equal(ours.kv_lens[:count], theirs.kv_lens[:count])
    assert (ours.kv_lens[count:] == -7).all()
    assert (ours.positions[total:] == -7).all()
    for group in range(2):
        assert torch.equal(ours.kv_slots[group], theirs.kv_slots[group])
        assert torch.equal(ours.resident[group], theirs.resident[group])
        for s, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            used = -(-(start + length) // 4)
            assert torch.equal(ours.tables[group][s, :used], theirs.tables[group][s, :used])


@pytest.mark.parametrize("unpack", [unpack_torch, unpack_triton])
def test_rows_that_pad_a_graph_write_to_the_spare_block_alone(unpack: Unpack) -> None:
    """Two sequences in a step of four: the two rows that pad it must touch nobody's block."""
    buffers = StepBuffers(CONFIG, (50, 60), 1000, DEVICE, in_flight=1)
    layout, words = step_layout(4, 4, 2), buffers.staging_host[0].numpy()
    words[layout.slots] = [0, 1, buffers.spare_slot, buffers.spare_slot]
    words[layout.starts], words[layout.query_starts] = [8, 5, 0, 0], range(5)
    words[layout.tokens] = [11, 12, 0, 0]
    for group in range(2):
        buffers.resident[group][:2, :2] = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32, device=DEVICE)
        words[layout.first_new[group]] = [2, 2, 0, 0]
        words[layout.new_starts[group]] = [group, *[group + 1] * 4]
    words[layout.new_blocks : layout.new_blocks + 2] = [7, 9]
    buffers.send(0, layout.new_blocks + 2)
    unpack(buffers, layout, 1, [1, 1])
    for group, (new, spare) in enumerate(((7, 50), (9, 60))):
        assert buffers.kv_slots[group][:4].tolist() == [4 * new, 4 * 6 + 1, 4 * spare, 4 * spare]
        assert buffers.tables[group][:4, 0].tolist() == [3, 5, spare, spare]
        assert buffers.resident[group][buffers.spare_slot, :2].tolist() == [spare, spare]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 4096, 5001, 70000])
def test_greedy_equals_torch_also_for_ties_and_rows_that_are_not_finite(dtype: torch.dtype, vocab: int) -> None:
    layout = step_layout(6, 6, 2)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).to(DEVICE, dtype)
    logits[0] = logits[0].round()
    logits[1] = 0.0
    logits[2, vocab // 2] = float("nan")
    logits[3, 3] = float("inf")
    logits[4] = float("-inf")
    results = []
    for greedy in (greedy_torch, greedy_triton):
        buffers = StepBuffers(CONFIG, (50, 60), vocab, DEVICE, in_flight=1)
        buffers.staging[layout.slots] = torch.tensor([4, 2, 0, 1, 9, 7], dtype=torch.int32, device=DEVICE)
        buffers.sampled.fill_(-7)
        buffers.last_token.fill_(-7)
        greedy(buffers, layout, logits)
        results.append((buffers.sampled.tolist(), buffers.last_token.tolist()))
    assert results[0] == results[1]
    assert results[0][0][1] == 0
    assert results[0][0][2:5] == [-1, -1, -1]
