"""The byte ledger of a device: what everything will take, known before the KV cache gets the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from foretell.errors import ConfigError


@dataclass(slots=True)
class MemoryLedger:
    """Bytes by purpose within ``share`` of a device's memory; planned, not measured afterwards."""

    total_bytes: int
    share: float
    entries: dict[str, int] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        return int(self.total_bytes * self.share)

    @property
    def planned_bytes(self) -> int:
        return sum(self.entries.values())

    def left_for_kv(self, wanted: int | None) -> int:
        """What the entries so far leave to the KV cache, or ``wanted`` of it. ConfigError if that is not there."""
        left = self.budget_bytes - self.planned_bytes
        if left <= 0 or (wanted or 0) > left:
            parts = ", ".join(f"{name} {bytes_ / 2**30:.2f}" for name, bytes_ in self.entries.items())
            asked = "a KV cache" if wanted is None else f"a KV cache of {wanted / 2**30:.2f} GiB"
            raise ConfigError(
                f"{asked} does not fit in {self.share:.0%} of the device's {self.total_bytes / 2**30:.1f} GiB beside "
                f"the rest (GiB: {parts}): raise memory_share, or lower max_num_batched_tokens or max_num_seqs"
            )
        return wanted or left
