"""A model made of hashes: small, exact, and merciless about KV blocks.

Each KV slot holds a hash of the whole history up to its token. Before a token is 'computed', every slot that
its attention would read must hold the right history; the sampled token is a function of the history alone.
So whatever the scheduler does, outputs must equal ``reference_output`` and a wrong block shows at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from foretell.core.messages import Batch, Chunk, ChunkResult, Result
from foretell.core.params import SamplingParams

VOCAB = 50
EOS = 7
SEED = 1469598103934665603


def extend_history(history: int, token: int) -> int:
    return ((history ^ (token + 1)) * 1099511628211) % 2**64


def next_token(history: int) -> int:
    return (history >> 17) % VOCAB


def reference_output(prompt: list[int], params: SamplingParams, limit: int) -> list[int]:
    history = SEED
    for token in prompt:
        history = extend_history(history, token)
    outputs: list[int] = []
    most = limit - len(prompt) if params.max_tokens is None else min(params.max_tokens, limit - len(prompt))
    while len(outputs) < most:
        token = next_token(history)
        outputs.append(token)
        history = extend_history(history, token)
        if token in params.stop_ids and len(outputs) > params.min_tokens:
            break
    return outputs


@dataclass
class Held:
    tokens: list[int]
    histories: list[int]
    tables: list[list[int]]


class HistoryExecutor:
    def __init__(
        self,
        num_blocks: tuple[int, ...],
        windows: tuple[int | None, ...],
        block_size: int,
        *,
        depth: int = 1,
        chain: int = 0,
    ) -> None:
        self.num_blocks, self.windows, self.block_size = num_blocks, windows, block_size
        self.depth, self.chain = depth, chain
        self.now = 0.0
        self.slots: list[dict[int, int]] = [{} for _ in windows]
        self.held: dict[int, Held] = {}
        self.queue: deque[Result] = deque()
        self.batches: list[Batch] = []

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)
        for request_id in batch.removed:
            self.held.pop(request_id, None)
        for added in batch.added:
            assert added.request_id not in self.held
            tokens = [*added.prompt_token_ids, *added.output_token_ids]
            history, histories = SEED, []
            for token in tokens:
                history = extend_history(history, token)
                histories.append(history)
            self.held[added.request_id] = Held(tokens, histories, [[] for _ in self.windows])
        for chunk in batch.chunks:  # every write of a batch comes before every read, as in a real step
            self._write(chunk)
        results = [self._read(chunk) for chunk in batch.chunks]
        self.now += 1.0
        self.queue.append(Result(batch.id, [r for r in results if r is not None], self.now - 1, self.now))

    def _slot(self, held: Held, group: int, position: int) -> int:
        block = held.tables[group][position // self.block_size]
        assert 0 <= block < self.num_blocks[group], "a token was planned into a block that is not there"
        return block * self.block_size + position % self.block_size

    def _write(self, chunk: Chunk) -> None:
        held = self.held[chunk.request_id]
        assert chunk.length >= 1
        assert chunk.start + chunk.length <= len(held.tokens), "planned beyond the tokens known to the worker"
        for group, new in enumerate(chunk.new_block_ids):
            held.tables[group].extend(new)
            for position in range(chunk.start, chunk.start + chunk.length):
                self.slots[group][self._slot(held, group, position)] = held.histories[position]

    def _read(self, chunk: Chunk) -> ChunkResult | None:
        held = self.held[chunk.request_id]
        end = chunk.start + chunk.length
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, chunk.start - window + 1)
            for position in range(first, end):
                found = self.slots[group].get(self._slot(held, group, position))
                assert found == held.histories[position], f"request {chunk.request_id} reads a foreign KV block"
        if not chunk.sample:
            return None
        assert end == len(held.tokens)
        token = next_token(held.histories[-1])
        held.tokens.append(token)
        held.histories.append(extend_history(held.histories[-1], token))
        return ChunkResult(chunk.request_id, token)

    def wait(self, until: float | None) -> Result | None:
        return self.queue.popleft() if self.queue else None

    def wake(self) -> None: ...

    def close(self) -> None: ...
