"""Sharded models in threads of one process: the logits of the whole model, and as many bytes as counted."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from foretell.config import ModelSpec, RopeSpec
from foretell.kernels.base import BatchContext, KVGroupView
from foretell.kernels.reference import ReferenceKernels
from foretell.model.build import Builder
from foretell.model.parameters import weight_shapes
from foretell.model.transformer import Transformer
from foretell.model.weights import Take
from foretell.parallel.device_comm import Unsummed
from foretell.parallel.layout import make_layout, shard_spec
from foretell.parallel.shard import ShardedWeights
from foretell.parallel.volume import volume
from foretell.parallel.wrap import wrap
from foretell.store.gguf_rows import QuantisedRows
from foretell.worker.kv import allocate
from tests.parallel.test_layout import spec_of

TOKENS = [3, 100, 7, 7, 55, 0]


class RandomWeights:
    """Every weight random, biases and norms too, so that nothing is right by being zero or one."""

    def __init__(self, spec: ModelSpec) -> None:
        self.shapes = weight_shapes(spec)

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        tensor = torch.randn(self.shapes[name], generator=generator).to(dtype) * 0.3
        return tensor if take is None else take(tensor)

    def blocks(self, name: str) -> QuantisedRows | None:
        return None


class Threads:
    """A group whose ranks are threads: real sums and gathers, in the order of the shards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.sums = self.sum_bytes = 0

    def exchange(self, shard: int, x: Tensor) -> list[Tensor]:
        self.parts[shard] = x.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class Deferring(ReferenceKernels):
    """As on GPUs: sums wait for the norm behind them."""

    defers_sums = True


class ThreadGroup:
    """``lazy``: sums of halves are left to the norm behind them, as on GPUs."""

    inbox, ordered, kernels = None, False, Deferring()

    def __init__(self, threads: Threads, shard: int, *, lazy: bool = False) -> None:
        self.threads, self.size, self.shard, self.lazy = threads, threads.size, shard, lazy

    def sum_(self, x: Tensor) -> Tensor:
        if self.shard == 0:
            self.threads.sums += 1
            self.threads.sum_bytes += x.nbytes
        return x.copy_(torch.stack(self.threads.exchange(self.shard, x)).sum(0))

    def summed(self, x: Tensor) -> Tensor | Unsummed:
        group: Any = self
        return Unsummed(group, x) if self.lazy else self.sum_(x)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.threads.exchange(self.shard, x), dim=1)

    def gather_into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self.gather(x)[:, : out.shape[1]])


def build(spec: ModelSpec, tp: int, shard: int, *, lazy: bool = False) -> Transformer:
    weights: Any = RandomWeights(spec)
    weights = ShardedWeights(weights, spec, tp, shard) if tp > 1 else weights
    kernels = Deferring() if lazy else ReferenceKernels()
    return Builder(shard_spec(spec, tp), weights, kernels, torch.float32).build()


def logits(model: Transformer) -> Tensor:
    count = len(TOKENS)
    kv = allocate(model.spec, (4,), 4, torch.float32)
    tables = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    context = BatchContext(
        positions=torch.arange(count),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        kv_lens=torch.tensor([count], dtype=torch.int32),
        groups=(KVGroupView(tables, torch.arange(count)),),
        block_size=4,
        max_query_len=count,
        max_kv_len=count,
    )
    with torch.inference_mode():
        return model.logits(model.forward(torch.tensor(TOKENS), context, kv))


ROPE = RopeSpec(theta=10000.0, dim=8)
GATED = spec_of(8, 2, rope=ROPE, attention_scale=0.35)
SPECS = {
    "gated, GQA": GATED,
    "tied": replace(GATED, tied_embeddings=True),
    "all heads normed together, after each half": replace(GATED, qk_norm="full", norm_placement="post"),
    "each head normed, MQA": replace(GATED, qk_norm="head", num_kv_heads=1),
    "all key heads normed together, replicated": replace(GATED, qk_norm="full", num_kv_heads=1),
    "plain, biases, learned positions": spec_of(
        8, 8, norm="layer", norm_bias=True, gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True,
        learned_positions=16, activation="gelu_tanh", attention_scale=0.35,
    ),
    "parallel halves, one norm": replace(GATED, parallel_block=True, shared_block_norm=True, norm="layer"),
    "biased head, multipliers": replace(
        GATED, lm_head_bias=True, embedding_multiplier=3.0, residual_multiplier=0.5, logits_divisor=2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", SPECS)
def test_shards_together_compute_the_model(kind: str, tp: int, lazy: bool) -> None:
    spec = SPECS[kind]
    expected = logits(build(spec, 1, 0))
    threads = Threads(tp)

    def rank(shard: int) -> Tensor:
        return logits(
            wrap(build(spec, tp, shard, lazy=lazy), ThreadGroup(threads, shard, lazy=lazy), spec.vocab_size)
        )

    with ThreadPoolExecutor(tp) as pool:
        found = list(pool.map(rank, range(tp)))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.allclose(found[0], expected, atol=1e-4, rtol=1e-4)
    counted = volume(spec, make_layout(spec, tp, 1), len(TOKENS), len(TOKENS), 4)
    assert (threads.sums, threads.sum_bytes) == (counted.sums, counted.sum_bytes)


def test_a_rank_sends_what_the_formula_says() -> None:
    """By hand: 4 layers, h = 24, 10 tokens of 4 bytes; ring of 2: each rank sends its share once around."""
    spec = spec_of(8, 8)
    two = volume(spec, make_layout(spec, 2, 1), 10, 1, 4)
    hidden = 10 * 24 * 4
    assert two.sum_bytes == 9 * hidden
    assert two.bytes_per_rank(make_layout(spec, 2, 1)) == 9 * hidden + prod((1, 102, 4)) / 2
    stages = volume(spec, make_layout(spec, 1, 4), 10, 1, 4)
    assert (stages.sums, stages.sends, stages.send_bytes) == (0, 3, 3 * hidden)
    assert stages.bytes_per_rank(make_layout(spec, 1, 4)) == hidden
