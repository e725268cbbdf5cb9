"""Scheduling policies. A policy is an ordering of phases, and whether phases may share a batch; the token
budget, memory, admission, preemption and ageing exist once, in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from foretell.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Policy:
    """Lower rank goes first. Without ``mixes`` the batch has the phase of the first request scheduled."""

    name: str
    prefill_rank: int
    decode_rank: int
    mixes: bool


POLICIES = {
    policy.name: policy
    for policy in (
        # New prompts at once: the batch fills up fast and TTFT is short, but running decodes stall.
        Policy("prefill-first", prefill_rank=0, decode_rank=1, mixes=False),
        # Running decodes undisturbed: steady TPOT, but new requests wait until all are done, or are aged.
        Policy("decode-first", prefill_rank=1, decode_rank=0, mixes=False),
        # Decodes, then prompt chunks in what is left of the budget (Sarathi-Serve, Agrawal et al. 2024).
        Policy("mixed", prefill_rank=1, decode_rank=0, mixes=True),
    )
}


def get_policy(name: str) -> Policy:
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}") from None
