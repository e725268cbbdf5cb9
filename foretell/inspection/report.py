"""``foretell inspect --json``: the numbers of an Inspection by name, each with its unit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from foretell.inspection.examine import BATCH_SIZES, DTYPE_BYTES, AtContext, Inspection, Intensity
from foretell.inspection.words import decode_sentence, prefill_sentence


def as_dict(inspection: Inspection) -> dict[str, Any]:
    spec = inspection.spec
    return {
        "model": inspection.reference,
        "name": inspection.name,
        "path": inspection.path,
        "format": inspection.format,
        "family": spec.family,
        "dtype": inspection.dtype,
        "bytes_per_element": inspection.bytes_per_element,
        "shape": _shape(inspection),
        "attention": _attention(inspection),
        "parameters": _parameters(inspection),
        "weights_bytes": {name: inspection.counts.total * size for name, size in DTYPE_BYTES.items()},
        "stored": {
            "file_bytes": inspection.file_bytes,
            "by_type": [asdict(kind) | {"bits_per_parameter": kind.bits_per_parameter} for kind in inspection.stored],
        },
        "kv_cache": {
            "bytes_per_token": inspection.kv_bytes_per_token,
            "bytes_per_token_per_layer": inspection.kv_bytes_per_token // spec.num_layers,
            "bytes_per_token_if_mha": inspection.kv_bytes_per_token * spec.query_heads_per_kv_head,
        },
        "memory": _memory(inspection),
        "per_token": [_per_token(at) for at in inspection.contexts],
        "attention_exceeds_mlp_from_tokens": inspection.crossover_tokens,
        "intensity": {
            "prefill": _intensity(inspection.prefill),
            "decode": _intensity(inspection.decode),
            "decode_batched": _intensity(inspection.decode_batched),
            "prefill_in_words": prefill_sentence(inspection.prefill),
            "decode_in_words": decode_sentence(inspection.decode, inspection.decode_batched),
        },
    }


def _shape(inspection: Inspection) -> dict[str, Any]:
    spec = inspection.spec
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_context_tokens": spec.max_position_embeddings,
        "activation": spec.activation,
        "gated_mlp": spec.gated_mlp,
        "norm": spec.norm,
        "norm_placement": spec.norm_placement,
        "qk_norm": spec.qk_norm,
        "tied_embeddings": spec.tied_embeddings,
        "learned_positions": spec.learned_positions,
        "rope": None if spec.rope is None else asdict(spec.rope),
        "local_rope": None if spec.local_rope is None else asdict(spec.local_rope),
    }


def _attention(inspection: Inspection) -> dict[str, Any]:
    spec = inspection.spec
    return {
        "kind": spec.attention_kind,
        "num_query_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "query_heads_per_kv_head": spec.query_heads_per_kv_head,
        "head_dim": spec.head_dim,
        "kv_head_of_query_head": [head // spec.query_heads_per_kv_head for head in range(spec.num_heads)],
        "window_tokens_by_layer": list(spec.windows),
        "num_full_layers": sum(window is None for window in spec.windows),
        "num_sliding_layers": sum(window is not None for window in spec.windows),
    }


def _parameters(inspection: Inspection) -> dict[str, Any]:
    counts = inspection.counts
    return {
        "total": counts.total,
        "embedding": counts.embedding,
        "positions": counts.positions,
        "layer": dict(counts.layer),
        "per_layer": counts.per_layer,
        "all_layers": counts.per_layer * counts.num_layers,
        "final_norm": counts.final_norm,
        "head": counts.head,
        "estimate": asdict(inspection.estimate),
    }


def _memory(inspection: Inspection) -> list[dict[str, int]]:
    rows = []
    for at in inspection.contexts:
        for batch_size in BATCH_SIZES:
            total = inspection.memory_bytes(at.context_tokens, batch_size)
            rows.append({
                "context_tokens": at.context_tokens,
                "batch_size": batch_size,
                "weights_bytes": inspection.weights_bytes,
                "kv_bytes": total - inspection.weights_bytes,
                "total_bytes": total,
            })  # fmt: skip
    return rows


def _per_token(at: AtContext) -> dict[str, int]:
    flops = {f"{name}_flops": value for name, value in asdict(at.flops).items()}
    traffic = {f"{name}_bytes": value for name, value in asdict(at.traffic).items()}
    return {
        "context_tokens": at.context_tokens,
        **flops,
        "total_flops": at.flops.total,
        **traffic,
        "total_bytes": at.traffic.total,
        "kv_cache_bytes": at.kv_bytes,
    }


def _intensity(at: Intensity) -> dict[str, Any]:
    return asdict(at) | {"flops_per_byte": at.flops_per_byte}
