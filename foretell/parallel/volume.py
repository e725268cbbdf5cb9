"""What a step sends between ranks, by counting: no torch, no measurement. The cost model reads this too."""

from __future__ import annotations

from dataclasses import dataclass

from foretell.config import ModelSpec
from foretell.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Volume:
    """Of one step. ``sum_bytes``: of the tensors that are added up over a group, all stages together; a rank sends
    and receives 2·(tp-1)/tp of its share in a ring or by reduce-scatter and gather (Thakur et al. 2005)."""

    sums: int
    sum_bytes: int
    gather_bytes: int  # logits that reach the rank that samples
    sends: int
    send_bytes: int  # hidden states between stages, on every shard

    def bytes_per_rank(self, layout: Layout) -> float:
        """Most bytes that one rank sends in the step."""
        tp, pp = layout.tp, layout.pp
        shared = self.sum_bytes / pp * 2 * (tp - 1) / tp + self.gather_bytes * (tp - 1) / tp
        return shared + (self.send_bytes / (tp * (pp - 1)) if pp > 1 else 0.0)


def volume(spec: ModelSpec, layout: Layout, tokens: int, sampled: int, element_bytes: int) -> Volume:
    """A step of ``tokens`` tokens of which ``sampled`` are sampled from; activations of ``element_bytes``."""
    hidden = tokens * spec.hidden_size * element_bytes
    split = layout.tp > 1
    sums = 2 * spec.num_layers + 1 if split else 0  # each half of each layer, and the embedding
    norms = 2 * spec.num_layers if split and spec.qk_norm == "full" else 0
    padded = -(-spec.vocab_size // layout.tp) * layout.tp
    hops = layout.pp - 1
    return Volume(
        sums=sums + norms,
        sum_bytes=sums * hidden + norms * tokens * 4,
        gather_bytes=sampled * padded * 4 if split else 0,
        sends=hops * layout.tp,
        send_bytes=hops * layout.tp * hidden,
    )
