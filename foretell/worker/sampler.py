"""Logits → next tokens, for all rows of a batch at once.

Order, as in the field: logit_bias, allowed and banned tokens, penalties, temperature, top-k, top-p, min-p,
then one draw. A draw uses one uniform number, a hash of the request's seed and the output index: the same seed
gives the same text whatever else is in the batch, and after a preemption.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from foretell.core.messages import ChunkResult, TokenLogprobs
from foretell.worker.state import RequestState

NEG_INF = float("-inf")
FIRST_CANDIDATES = 256  # of a nucleus: nearly always enough; the full sort is the exception


def uniform(seed: int, index: int) -> float:
    """A number in (0, 1) from 32 bits of a hash of seed and output index."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**32


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, logits: Tensor, states: list[RequestState]) -> list[ChunkResult]:
        """logits [R, vocab] float32, one row per state → one result per row. A row without a finite maximum
        (NaN or all -inf) fails alone."""
        best, greedy = logits.max(dim=-1)
        finite = torch.isfinite(best)
        tokens = greedy.clone()
        special = [i for i, s in enumerate(states) if not s.params.is_plain_greedy]
        if special:
            tokens[special] = self._choose(logits[special], [states[i] for i in special])
        logprobs = self._logprobs(logits, tokens, states)
        results = []
        for state, token, ok, item in zip(states, tokens.tolist(), finite.tolist(), logprobs, strict=True):
            if not ok:
                error = "the model's logits are not finite: the weights or the dtype are unsuitable"
                results.append(ChunkResult(state.id, error=error))
            elif token < 0:
                error = "no token may be sampled: bans, biases and allowed tokens exclude every one"
                results.append(ChunkResult(state.id, error=error))
            else:
                results.append(ChunkResult(state.id, token, item))
        return results

    def _choose(self, logits: Tensor, states: list[RequestState]) -> Tensor:
        """Tokens [R] for rows that reshape their logits or draw; -1 where every token is excluded."""
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.params.reshapes_logits:
                apply_bans_and_biases(row, state)
        penalised = [i for i, s in enumerate(states) if _has_penalties(s)]
        if penalised:
            logits[penalised] = apply_penalties(logits[penalised], [states[i] for i in penalised])
        best, tokens = logits.max(dim=-1)
        tokens = torch.where(best > NEG_INF, tokens, -1)
        drawn = [i for i, s in enumerate(states) if s.params.temperature > 0 and tokens[i] >= 0]
        if drawn:
            chosen = [states[i] for i in drawn]
            temperatures = torch.tensor([max(s.params.temperature, 1e-4) for s in chosen])
            scaled = logits[drawn] / temperatures[:, None]
            tokens[drawn] = draw(truncate(scaled, chosen), chosen)
        return tokens

    def _logprobs(self, logits: Tensor, tokens: Tensor, states: list[RequestState]) -> list[TokenLogprobs | None]:
        """Log-probabilities of the raw distribution (before penalties and temperature) where asked for."""
        found: list[TokenLogprobs | None] = [None] * len(states)
        rows = [i for i, s in enumerate(states) if s.params.logprobs is not None]
        if rows:
            counts = [states[i].params.logprobs or 0 for i in rows]
            for i, item in zip(rows, token_logprobs(logits[rows], tokens[rows].clamp(min=0), counts), strict=True):
                found[i] = item
        return found


def token_logprobs(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Log-probability and rank of ``tokens`` [R] under ``logits`` [R, vocab], with the top ``counts[r]``."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > own).sum(dim=-1) + 1
    k = min(max(counts), logits.shape[-1])
    values, ids = logprobs.topk(k, dim=-1)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, rank, row_ids, row_values, count in zip(
            tokens.tolist(), own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts, strict=True
        )
    ]


def _has_penalties(state: RequestState) -> bool:
    p = state.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


def apply_bans_and_biases(row: Tensor, state: RequestState) -> None:
    """logit_bias, allowed_token_ids, bad words and min_tokens, in place on one row [vocab]."""
    p, vocab = state.params, row.shape[0]
    for token, bias in p.logit_bias.items():
        if token < vocab:
            row[token] += bias
    if p.allowed_token_ids is not None:
        allowed = torch.tensor([t for t in p.allowed_token_ids if t < vocab], dtype=torch.int64)
        kept = row[allowed]
        row.fill_(NEG_INF)
        row[allowed] = kept
    recent = state.tokens[: state.num_tokens]
    for word in p.bad_token_ids:
        prefix = list(word[:-1])
        if len(prefix) <= state.num_outputs and recent[len(recent) - len(prefix) :].tolist() == prefix:
            row[word[-1]] = NEG_INF
    if state.num_outputs < p.min_tokens:
        row[[t for t in p.stop_ids if 0 <= t < vocab]] = NEG_INF


def apply_penalties(logits: Tensor, states: list[RequestState]) -> Tensor:
    """OpenAI's presence and frequency penalties over the output, and CTRL's repetition penalty (Keskar et al.
    2019) over prompt and output; logits [R, vocab]."""
    vocab = logits.shape[-1]
    for state in states:
        if state.counts is None or state.prompt_seen is None:
            outputs = torch.from_numpy(state.output_ids.copy())
            state.counts = torch.bincount(outputs, minlength=vocab).to(torch.int32)
            state.prompt_seen = torch.zeros(vocab, dtype=torch.bool)
            state.prompt_seen[torch.from_numpy(state.tokens[: state.prompt_len].copy())] = True
    counts = torch.stack([s.counts for s in states if s.counts is not None])
    prompt_seen = torch.stack([s.prompt_seen for s in states if s.prompt_seen is not None])

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s.params, name) for s in states], dtype=logits.dtype)[:, None]

    repetition = column("repetition_penalty")
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt_seen | (counts > 0), repeated, logits)
    return logits - column("frequency_penalty") * counts - column("presence_penalty") * (counts > 0)


def truncate(logits: Tensor, states: list[RequestState]) -> Tensor:
    """Probabilities [R, vocab] with everything outside top-k, top-p and min-p set to 0 (not renormalised)."""
    vocab = logits.shape[-1]
    rows = [i for i, s in enumerate(states) if 0 < s.params.top_k < vocab or s.params.top_p < 1]
    probs = torch.softmax(logits, dim=-1)
    if rows:
        probs[rows] = _keep_nucleus(probs[rows], [states[i] for i in rows])
    min_p = torch.tensor([s.params.min_p for s in states], dtype=probs.dtype)[:, None]
    if bool(min_p.any()):
        probs = torch.where(probs >= min_p * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    return probs


def _keep_nucleus(probs: Tensor, states: list[RequestState]) -> Tensor:
    """Top-k, then top-p of what top-k left: tokens whose predecessors' mass, in descending order, is < top_p."""
    vocab = probs.shape[-1]
    top_k = torch.tensor([s.params.top_k if 0 < s.params.top_k < vocab else vocab for s in states])[:, None]
    top_p = torch.tensor([s.params.top_p for s in states], dtype=torch.float64)[:, None]
    width = min(vocab, FIRST_CANDIDATES)
    while True:
        values, ids = probs.topk(width, dim=-1)
        inside = torch.arange(width)[None, :] < top_k
        values = torch.where(inside, values.double(), 0.0)
        total = values.sum(-1, keepdim=True)
        # the candidates suffice when each row's top-k or nucleus ends within them
        if width == vocab or bool(((top_k <= width) | ((top_k == vocab) & (total >= top_p))).all()):
            break
        width = min(vocab, width * 16)
    before = values.cumsum(-1) - values
    mass = torch.where(top_k <= width, total, 1.0)
    kept = inside & (before < top_p * mass)
    return torch.zeros_like(probs).scatter_(1, ids, torch.where(kept, values, 0.0).to(probs.dtype))


def draw(probs: Tensor, states: list[RequestState]) -> Tensor:
    """One token per row [R] by inverting the cumulative distribution; probs [R, vocab] need not sum to 1."""
    cumulative = probs.double().cumsum(dim=-1)
    u = [uniform(s.params.seed or 0, s.num_outputs) for s in states]
    threshold = torch.tensor(u, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
