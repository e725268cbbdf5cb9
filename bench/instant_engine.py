"""An engine process whose model takes no time: ``python bench/instant_engine.py [STEP_SECONDS] FD``.

It stands in for ``foretell.server.engine_process`` where everything but the model is measured or tested. Token ids
are 0 … 93: in a byte-level vocabulary in order of the alphabet, the printable ASCII characters.
"""

from __future__ import annotations

import sys
from typing import Any

from foretell.core.engine import Engine
from foretell.executor.instant import InstantRunner
from foretell.executor.local import LocalExecutor
from foretell.options import EngineOptions, scheduler_config
from foretell.server import wire
from foretell.server.engine_process import OnPhase, serve

NUM_IDS = 94
CONTEXT = 1 << 20
KV_BLOCKS = 1 << 14
step_seconds = float(sys.argv[1]) if len(sys.argv) > 2 else 0.0


def build(options: dict[str, Any], on_phase: OnPhase) -> tuple[Engine, wire.Ready]:
    made = EngineOptions(**options)
    runner = InstantRunner(NUM_IDS, step_seconds=step_seconds)
    executor = LocalExecutor(runner, (KV_BLOCKS,))  # type: ignore[arg-type]
    engine = Engine(scheduler_config(made, made.max_model_len or CONTEXT), executor)
    on_phase("weights", 0.0)
    limit = engine.scheduler.max_tokens_per_request
    return engine, wire.Ready(
        model=made.model, spec=None, vocab_size=CONTEXT, eos_token_ids=[CONTEXT], dtype="none", weight_format="none",
        max_model_len=engine.scheduler.config.max_model_len, max_tokens_per_request=limit, kernels="none",
        max_num_seqs=engine.scheduler.config.max_num_seqs, weight_bytes=0, kv_bytes=0, kv_element_bytes=0,
        kv_tokens=KV_BLOCKS * made.block_size, phases={},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[-1]), build))
