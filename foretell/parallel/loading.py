"""How a rank gets its share: meet the others, read what is its own, make room for keys and values."""

from __future__ import annotations

import gc
import os
import time
from typing import TYPE_CHECKING, Protocol

from foretell.memory import resident_bytes
from foretell.parallel.messages import Ready, Setup

if TYPE_CHECKING:
    import torch

    from foretell.kernels.base import Kernels
    from foretell.model.transformer import Transformer
    from foretell.model.weights import Weights
    from foretell.parallel.device_stage import DeviceStage
    from foretell.parallel.stage import StageRunner


class Phase(Protocol):
    """Where it is told what a rank is at."""

    phase: str


class Loading:
    """One rank's start, on whatever device; every phase is timed and told to the driver by the heart."""

    def __init__(self, setup: Setup, heart: Phase) -> None:
        self.setup, self.heart = setup, heart
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        heart.phase = "importing torch"
        import torch

        torch.set_num_threads(setup.num_threads)
        from foretell.model.load import DTYPES, spec_for
        from foretell.parallel.layout import make_layout, shard_spec
        from foretell.store import resolve

        self._done("import torch")
        if setup.store_url.startswith("file:"):  # all on this host
            # of a pair there is nothing but sends, and they shall be in order
            os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo")
        self.files = resolve(setup.model, offline=setup.offline)
        self.spec = spec_for(self.files)
        self.layout = make_layout(self.spec, setup.tp, setup.pp)
        self.place = self.layout.place(setup.rank)
        self.own, self.dtype = shard_spec(self.spec, setup.tp), DTYPES[setup.dtype]

    def _done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now

    def on_cpu(self) -> tuple[StageRunner, Ready]:
        from foretell.kernels import get_kernels
        from foretell.parallel.comm import Communicator
        from foretell.parallel.stage import StageRunner
        from foretell.parallel.wrap import wrap
        from foretell.worker.kv import allocate

        setup, own = self.setup, self.own
        self.heart.phase = "meeting the other ranks"
        comm = Communicator(
            self.layout, self.place, setup.store_url, backend="gloo", timeout_seconds=setup.timeout_seconds
        )
        comm.preflight()
        self._done("meeting")
        self.heart.phase = "loading weights"
        kernels = get_kernels(setup.kernels, batch_invariant=setup.batch_invariant)
        kernels.set_threads(setup.num_threads)
        before = resident_bytes()
        model = wrap(self._build(kernels, None), comm, self.spec.vocab_size)
        resident = resident_bytes() - before
        self._done("weights")
        kv = allocate(own, tuple(setup.num_blocks), setup.config.block_size, self.dtype, self.place.layers)
        torch_threads = 1 if kernels.name == "cpu" else None
        runner = StageRunner(
            model, kv, setup.config.block_size, comm, self.spec.vocab_size, torch_threads=torch_threads
        )
        self._open_grammars(runner)
        self.heart.phase = "waiting for the others to load"
        comm.preflight()
        return runner, self._ready(model, resident, kernels, setup.num_blocks)

    def on_gpu(self) -> tuple[DeviceStage, Ready]:
        import torch

        from foretell.kernels import get_kernels
        from foretell.parallel.device_comm import DeviceCommunicator
        from foretell.parallel.device_stage import DeviceStage
        from foretell.parallel.wrap import wrap
        from foretell.worker.cuda_setup import cuda_runner
        from foretell.worker.kv import kv_cache_dtype

        setup = self.setup
        self.heart.phase = "meeting the other ranks"
        device = torch.device("cuda", setup.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        kernels = get_kernels(setup.kernels, device="cuda", batch_invariant=setup.batch_invariant)
        kv_dtype = kv_cache_dtype(setup.kv_cache_dtype, self.dtype)
        compiling = kernels.prepare(
            self.own, self.dtype, setup.config.block_size, device, kv_dtype=kv_dtype, quantization=setup.quantization
        )
        comm = DeviceCommunicator(
            self.layout, self.place, setup.store_url, kernels, device, timeout_seconds=setup.timeout_seconds,
            ordered=setup.batch_invariant,
        )  # fmt: skip
        comm.preflight()
        self._done("meeting")
        self.heart.phase = "loading weights"
        before = torch.cuda.memory_allocated(device)
        model = wrap(self._build(kernels, device), comm, self.spec.vocab_size)
        resident = torch.cuda.memory_allocated(device) - before
        gc.collect()
        gc.freeze()
        self._done("weights")
        compiling()
        self._done("compiling")
        self.heart.phase = "running the largest step once"
        runner, num_blocks, ledger = cuda_runner(
            model, setup.config, kv_dtype, device, memory_share=setup.memory_share,
            kv_cache_bytes=setup.kv_cache_bytes, done=self._done, layers=self.place.layers, least=comm.least,
            make=lambda kv, spare, *, graphs: DeviceStage(
                model, kv, setup.config, spare, comm, self.spec.vocab_size, graphs=graphs
            ),
        )  # fmt: skip
        assert isinstance(runner, DeviceStage), "it was made so"
        self._open_grammars(runner)
        self.heart.phase = "waiting for the others to load"
        comm.preflight()
        ready = self._ready(model, resident, kernels, list(num_blocks))
        ready.ledger = ledger.entries
        return runner, ready

    def _build(self, kernels: Kernels, device: torch.device | None) -> Transformer:
        """This rank's share of the model, not yet joined to the others."""
        import torch

        from foretell.model.build import Builder
        from foretell.model.load import build_from

        setup, weights = self.setup, self._weights(device)
        builder = Builder(
            self.own, self._share(weights), kernels, self.dtype, layers=self.place.layers, device=device,
            activation_dtype=torch.float32 if device is None else self.dtype,
            keep_quantised=setup.keep_quantised and device is None, quantization=setup.quantization,
        )  # fmt: skip
        return build_from(weights, builder)

    def _weights(self, device: torch.device | None) -> Weights:
        """The whole model's."""
        from foretell.model.device_weights import DeviceDummyWeights, DeviceFileWeights
        from foretell.model.weights import DummyWeights, FileWeights
        from foretell.store import open_tensors

        spec, seed = self.spec, self.setup.seed
        if self.setup.load_format == "dummy":
            return DummyWeights(spec, seed) if device is None else DeviceDummyWeights(spec, seed, device)
        source = open_tensors(self.files)
        return FileWeights(source, spec) if device is None else DeviceFileWeights(source, spec, device)

    def _share(self, weights: Weights) -> Weights:
        from foretell.parallel.shard import ShardedWeights

        return ShardedWeights(weights, self.spec, self.setup.tp, self.place.shard) if self.setup.tp > 1 else weights

    def _open_grammars(self, runner: StageRunner | DeviceStage) -> None:
        from foretell.grammar.compiler import GrammarCompiler
        from foretell.store import load_tokenizer

        if runner.samples:
            runner.grammars = GrammarCompiler(lambda: load_tokenizer(self.files), self.spec.vocab_size)

    def _ready(self, model: Transformer, resident: int, kernels: Kernels, num_blocks: list[int]) -> Ready:
        self.seconds["whole"] = sum(self.seconds.values()) + time.perf_counter() - self._last
        return Ready(model.weight_bytes, resident, model.weight_format, kernels.name, self.seconds, num_blocks)
