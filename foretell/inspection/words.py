"""What the operations per byte of a phase mean, in one plain sentence each."""

from __future__ import annotations

from typing import Final

from foretell.inspection.examine import Intensity

# Operations a machine does in the time it reads one byte, measured with bfloat16 products and plain copies:
# two threads of a Zen 4 server (430 GFLOP/s, 33 GB/s) and one H200 (788 TFLOP/s, 4.26 TB/s).
CPU_BALANCE: Final = 13
GPU_BALANCE: Final = 185


def prefill_sentence(at: Intensity) -> str:
    """Why a prefill is limited by what it is, in words."""
    start = f"Prefill of {at.tokens:,} tokens does {at.flops_per_byte:,.0f} operations for every byte it moves"
    if at.flops_per_byte >= GPU_BALANCE:
        return (
            f"{start}, because each weight that is read serves all the tokens; a machine can do {CPU_BALANCE} (CPU) "
            f"to {GPU_BALANCE} (H200) in that time, so it waits for arithmetic: compute-bound."
        )
    if at.flops_per_byte >= CPU_BALANCE:
        return (
            f"{start}: more than the {CPU_BALANCE} a CPU can do in that time (compute-bound there), fewer than the "
            f"{GPU_BALANCE} of an H200, which needs a longer prompt or several at once to be busy."
        )
    return f"{start}: so little that it waits for memory even on a CPU; the prompt is too short to fill it."


def decode_sentence(one: Intensity, many: Intensity) -> str:
    """Why decoding is limited by what it is, and what batching does to it, in words."""
    busy = "and then may be compute-bound on a CPU" if many.flops_per_byte >= CPU_BALANCE else "still memory-bound"
    return (
        f"Decode at {one.tokens:,} tokens of context reads every weight and all K and V for one token: "
        f"{one.flops_per_byte:.1f} operations per byte, so it waits for memory: memory-bound. "
        f"{many.batch_size} sequences share each weight that is read: {many.flops_per_byte:.1f} per byte, {busy}."
    )
