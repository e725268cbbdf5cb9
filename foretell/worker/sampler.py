"""Logits → next tokens, for all rows of a batch at once.

Order, as vLLM's: the output's form, logit_bias, allowed and banned tokens, penalties, temperature, min-p, top-k,
top-p, then one draw. A draw uses one uniform number, a hash of the request's seed and the output index: the same seed
gives the same text whatever else is in the batch, and after a preemption.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from foretell.core.messages import ChunkResult, TokenLogprobs
from foretell.worker.state import RequestState

NEG_INF = float("-inf")
CANDIDATES = 256  # likeliest tokens, among which a nucleus nearly always ends; sorting them all is the exception
RUN = 512  # probabilities summed as one when drawing


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
            tokens[special] = self._choose(_rows(logits, special), greedy[special], [states[i] for i in special])
        logprobs = self._logprobs(logits, tokens, states)
        results = []
        for state, token, ok, item in zip(states, tokens.tolist(), finite.tolist(), logprobs, strict=True):
            if state.form_error:
                results.append(ChunkResult(state.id, error=state.form_error))
            elif not ok:
                error = "the model's logits are not finite: the weights or the dtype are unsuitable"
                results.append(ChunkResult(state.id, error=error))
            elif token < 0:
                error = "no token may be sampled: bans, allowed tokens and the output's form exclude every one"
                results.append(ChunkResult(state.id, error=error))
            else:
                results.append(ChunkResult(state.id, token, item))
        return results

    def _choose(self, logits: Tensor, tokens: Tensor, states: list[RequestState]) -> Tensor:
        """Tokens [R] for rows that reshape their logits or draw, ``tokens`` being the likeliest as they are; -1
        where every token is excluded."""
        shaped = [i for i, s in enumerate(states) if s.params.reshapes_logits]
        if shaped:
            logits = logits.clone()
            forms = apply_forms(logits, states)
            for i in shaped:
                apply_bans_and_biases(logits[i], states[i], must_end=i in forms)
            apply_penalties(logits, states)
            best, tokens = logits.max(dim=-1)
            tokens = torch.where(best > NEG_INF, tokens, -1)
        drawn = [i for i, t in enumerate(tokens.tolist()) if states[i].params.temperature > 0 and t >= 0]
        if drawn:
            chosen = [states[i] for i in drawn]
            temperatures = torch.tensor([max(s.params.temperature, 1e-4) for s in chosen])
            scaled = _rows(logits, drawn) / temperatures[:, None]
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
    ranks = torch.stack([torch.count_nonzero(row > one) + 1 for row, one in zip(logprobs, own, strict=True)])
    k = min(max(counts), logits.shape[-1])
    values, ids = logprobs.topk(k, dim=-1)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, rank, row_ids, row_values, count in zip(
            tokens.tolist(), own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts, strict=True
        )
    ]


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """These rows, ascending; not a copy when they are all of them."""
    return x if len(rows) == len(x) else x[rows]


def _has_penalties(state: RequestState) -> bool:
    p = state.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


def apply_forms(logits: Tensor, states: list[RequestState]) -> set[int]:
    """Exclude, in place on logits [R, vocab], what the forms of outputs do not allow. Rows whose output is complete
    and can only end are returned: there min_tokens has no say."""
    rows = [i for i, s in enumerate(states) if s.form is not None]
    if not rows:
        return set()
    masks, must_end = [], set()
    for i in rows:
        state = states[i]
        assert state.form is not None
        allowed = state.form.allowed()
        state.form_error = state.form.error
        if state.params.min_tokens and state.form.only_ends(allowed):
            must_end.add(i)
        masks.append(allowed)
    banned = ~torch.from_numpy(np.stack(masks))
    if len(rows) == len(logits):
        logits.masked_fill_(banned, NEG_INF)
    else:
        logits[rows] = logits[rows].masked_fill_(banned, NEG_INF)
    return must_end


def apply_bans_and_biases(row: Tensor, state: RequestState, *, must_end: bool = False) -> None:
    """logit_bias, allowed_token_ids, bad words and min_tokens, in place on one row [vocab]."""
    p, vocab = state.params, row.shape[0]
    if p.logit_bias:
        ids, biases = state.bias_tensors(vocab)
        row[ids] += biases
    if p.allowed_token_ids is not None:
        allowed = state.allowed_tensor(vocab)
        kept = row[allowed]
        row.fill_(NEG_INF)
        row[allowed] = kept
    recent = state.tokens[: state.num_tokens]
    for word in p.bad_token_ids:  # a tokenizer may know ids beyond the model's vocabulary: those never come
        prefix = list(word[:-1])
        begins = len(prefix) <= state.num_outputs and recent[len(recent) - len(prefix) :].tolist() == prefix
        if begins and word[-1] < vocab:
            row[word[-1]] = NEG_INF
    if state.num_outputs < p.min_tokens and not must_end:
        row[[t for t in p.stop_ids if 0 <= t < vocab]] = NEG_INF


def apply_penalties(logits: Tensor, states: list[RequestState]) -> None:
    """OpenAI's presence and frequency penalties over the output, and CTRL's repetition penalty (Keskar et al.
    2019) over prompt and output, in place on logits [R, vocab]. Only tokens that have been seen are touched."""
    rows = [i for i, s in enumerate(states) if _has_penalties(s)]
    if not rows:
        return
    seen = [states[i].seen_tokens() for i in rows]
    sizes = torch.tensor([len(s) for s in seen])

    def spread(name: str) -> Tensor:
        values = torch.tensor([getattr(states[i].params, name) for i in rows], dtype=logits.dtype)
        return values.repeat_interleave(sizes)

    at = (torch.tensor(rows).repeat_interleave(sizes), torch.from_numpy(np.concatenate([s.token_ids for s in seen])))
    counts = torch.from_numpy(np.concatenate([s.output_counts for s in seen]))
    found, repetition = logits[at], spread("repetition_penalty")
    found = torch.where(found > 0, found / repetition, found * repetition)
    logits[at] = found - spread("frequency_penalty") * counts - spread("presence_penalty") * (counts > 0)


def truncate(logits: Tensor, states: list[RequestState]) -> Tensor:
    """Probabilities [R, vocab] with everything outside min-p, top-k and top-p set to 0 (not renormalised)."""
    vocab = logits.shape[-1]
    probs = torch.softmax(logits, dim=-1)
    min_p = torch.tensor([s.params.min_p for s in states], dtype=probs.dtype)[:, None]
    if bool(min_p.any()):
        probs = torch.where(probs >= min_p * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    rows = [i for i, s in enumerate(states) if 0 < s.params.top_k < vocab or s.params.top_p < 1]
    if rows:
        chosen = [states[i].params for i in rows]
        top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in chosen])
        top_p = torch.tensor([p.top_p for p in chosen], dtype=torch.float64)
        kept = _keep_nucleus(_rows(probs, rows), top_k, top_p)
        if len(rows) == len(states):
            probs = kept
        else:
            probs[rows] = kept
    return probs


def _keep_nucleus(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Top-k, then top-p of what top-k left: tokens whose predecessors' mass, in descending order, is < top_p of
    the whole."""
    result, undecided = keep_likeliest(probs, top_k, top_p, min(probs.shape[-1], CANDIDATES))
    for row in undecided.nonzero()[:, 0].tolist():
        result[row] = _keep_nucleus_of(probs[row], int(top_k[row]), float(top_p[row]))
    return result


def keep_likeliest(probs: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same among the ``width`` likeliest of each row, and for which rows those do not tell. No host sync."""
    vocab = probs.shape[-1]
    values, ids = probs.topk(width, dim=-1)
    inside = torch.arange(width, device=probs.device)[None, :] < top_k[:, None]
    values = torch.where(inside, values.double(), 0.0)
    found = values.sum(-1)
    mass = torch.where(top_k <= width, found, _run_ends(probs)[:, -1])
    before = values.cumsum(-1) - values
    kept = inside & ((before < (top_p * mass)[:, None]) | (top_p >= 1)[:, None])
    result = torch.zeros_like(probs).scatter_(1, ids, torch.where(kept, values, 0.0).to(probs.dtype))
    return result, (top_k > width) & ((top_k < vocab) | (found < top_p * mass))


def _keep_nucleus_of(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The same for one row [vocab], from all of it. Values alone are sorted, which is ten times as fast as with
    their places; of tokens with the last value that is kept, the first ones are taken."""
    ordered = np.sort(probs.numpy())[::-1][:top_k].astype(np.float64)
    reached = np.cumsum(ordered)
    count = 1 + int(np.searchsorted(reached, top_p * reached[-1])) if top_p < 1 else len(ordered)
    last = float(ordered[count - 1])
    kept = torch.where(probs > last, probs, 0.0)
    ties = (probs == last).nonzero()[:, 0][: count - int((probs > last).sum())]
    kept[ties] = last
    return kept


def draw(probs: Tensor, states: list[RequestState]) -> Tensor:
    """One token per row [R], each at its own request's number."""
    u = torch.tensor([uniform(s.params.seed or 0, s.num_outputs) for s in states], dtype=torch.float64)
    return draw_at(probs, u)


def draw_at(probs: Tensor, u: Tensor) -> Tensor:
    """One token per row [R] by inverting the cumulative distribution at u [R] float64 in (0, 1); probs [R, vocab]
    need not sum to 1.
    First among runs of ``RUN`` tokens, then within the run: one cheap pass over the vocabulary."""
    vocab, ends = probs.shape[-1], _run_ends(probs)
    whole = ends.shape[-1] - 1
    threshold = u[:, None] * ends[:, -1:]
    run = torch.searchsorted(ends, threshold, right=True).clamp(max=whole)
    begin = torch.where(run > 0, ends.gather(1, (run - 1).clamp(min=0)), 0.0)
    share = ((threshold - begin) / (ends.gather(1, run) - begin)).clamp(max=1 - 1e-9)
    ids = run * RUN + torch.arange(RUN, device=probs.device)
    inner = torch.where(ids < vocab, probs.gather(1, ids.clamp(max=vocab - 1)), 0.0).double().cumsum(-1)
    offset = torch.searchsorted(inner, share * inner[:, -1:], right=True)
    return (run * RUN + offset)[:, 0].clamp(max=vocab - 1)


def _run_ends(probs: Tensor) -> Tensor:
    """[R, vocab] → [R, runs] float64: the mass up to the end of each run of ``RUN`` tokens, then of the rest."""
    count, vocab = probs.shape
    whole = vocab // RUN
    sums = probs[:, : whole * RUN].reshape(count, whole, RUN).sum(-1)
    return torch.cat((sums, probs[:, whole * RUN :].sum(-1, keepdim=True)), dim=1).double().cumsum(-1)
