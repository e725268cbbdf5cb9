"""Puts a transformer together from canonical weights: stack, pack, and let go of each before the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from threading import Lock

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.errors import ConfigError
from foretell.kernels.base import HeadNorms, Kernels, Linear
from foretell.model.attention import Attention
from foretell.model.block import Block, SharedNormBlock
from foretell.model.mlp import MLP, GatedMLP, PlainMLP
from foretell.model.norm import DeferredRMSNorm, Norm, PostNorm, make_norm
from foretell.model.parameters import layer_norm_names, layer_prefix, stacked_names, weight_shapes
from foretell.model.residual import PendingSum, Residual
from foretell.model.transformer import Embedding, Head, Transformer
from foretell.model.weights import Weights, stack
from foretell.store.gguf_rows import QuantisedRows, stacked

Progress = Callable[[int, int], None]  # parameters loaded, parameters in all


class Builder:
    """Puts a transformer together from canonical weights.

    ``layers`` limits it to a pipeline stage: the embedding comes with the first layer, final norm and head
    with the last. ``spec`` may be a shard's (fewer heads), with ``weights`` to match. ``keep_quantised``: what
    the file has quantised stays so where the kernels can, the rest is kept in ``dtype``. ``quantization``: the
    format that the blocks' linear layers are rounded to; embedding and head stay in ``dtype``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        kernels: Kernels,
        dtype: torch.dtype,
        *,
        activation_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        layers: range | None = None,
        progress: Progress | None = None,
        keep_quantised: bool = False,
        quantization: str | None = None,
    ) -> None:
        self.spec, self.weights, self.kernels, self.dtype = spec, weights, kernels, dtype
        self.activation_dtype = activation_dtype
        self.device = device or torch.device("cpu")
        self.layers = layers if layers is not None else range(spec.num_layers)
        self.shapes = weight_shapes(spec)
        self.progress = progress
        self.keep_quantised = keep_quantised
        self.quantization = quantization
        self.loaded = self.weight_bytes = 0
        self.packed_types: set[str] = set()  # quantised formats that stay as they were shipped
        self.lock = Lock()
        self.total = sum(prod(shape) for name, shape in self.shapes.items() if self._holds(name))

    def build(self) -> Transformer:
        spec, layers = self.spec, self.layers
        with one_thread_per_layer(self.kernels) as pool:
            ends = pool.submit(self.ends)
            blocks = list(pool.map(self.block, layers))
            embedding, head = ends.result()
        return Transformer(
            spec=spec,
            embedding=embedding,
            head=head,
            blocks=blocks,
            final_norm=self.norm("final_norm") if layers.stop == spec.num_layers else None,
            first_layer=layers.start,
            stream=self.stream if self.kernels.defers_sums else None,
            activation_dtype=self.activation_dtype,
            weight_bytes=self.weight_bytes,
            weight_format=self.weight_format(),
        )

    def reads(self) -> list[list[str]]:
        """The weights that this stage reads, in about that order; those that are stacked, together."""
        return stacked_names(name for name in self.shapes if self._holds(name))

    def stream(self, x: Tensor) -> Residual:
        return PendingSum(self.kernels, x)

    def weight_format(self) -> str:
        """How the linear layers' weights are kept, for people."""
        if self.quantization is not None:
            return self.quantization
        if self.packed_types:
            return f"{'+'.join(sorted(self.packed_types))} as shipped"
        return str(self.dtype).removeprefix("torch.")

    def ends(self) -> tuple[Embedding | None, Head | None]:
        """What this stage has of embedding and head; tied ones are read once."""
        first, last = self.layers.start == 0, self.layers.stop == self.spec.num_layers
        table: Tensor | QuantisedRows | None = None
        linear: Linear | None = None
        if last and self.spec.tied_embeddings:
            linear, table = self.tied_head()
        embedding = self.embedding(table) if first else None
        if last and linear is None:
            linear = self.linear("lm_head")
        return embedding, None if linear is None else Head(linear, self.spec.logits_divisor)

    def embedding(self, table: Tensor | QuantisedRows | None) -> Embedding:
        positions = self.tensor("positions.weight", self.dtype) if self.spec.learned_positions else None
        if table is None:
            table = self.tensor("embedding.weight", self.dtype)
        on_cpu = isinstance(table, QuantisedRows) or table.device.type == "cpu"
        own = table.clone() if on_cpu else table  # not the mapped file
        self.count(own.nbytes + (0 if positions is None else positions.nbytes))
        return Embedding(own, positions, self.spec.embedding_multiplier, self.activation_dtype)

    def tied_head(self) -> tuple[Linear, Tensor | QuantisedRows]:
        """The head and the table that it was made of."""
        bias = self.tensor("lm_head.bias", torch.float32) if self.spec.lm_head_bias else None
        rows = self.blocks("embedding")
        if rows is not None and (linear := self.pack_blocks(rows, bias)) is not None:
            return linear, rows
        table = self.tensor("embedding.weight", self.dtype)
        return self.counted(self.kernels.pack_linear(table, bias)), table

    def block(self, layer: int) -> Block | SharedNormBlock:
        spec, prefix = self.spec, layer_prefix(layer)
        names = layer_norm_names(spec)
        norms = {name: self.norm(prefix + name) for name in names if "post" not in name}
        attention, mlp = self.attention(layer), self.mlp(layer)
        if spec.shared_block_norm:
            return SharedNormBlock(attention, mlp, norms["attention_norm"])
        block = Block(
            attention, mlp, **norms, residual_multiplier=spec.residual_multiplier, parallel=spec.parallel_block
        )
        for name in names:
            if "post" in name:
                setattr(block, name, self.post_norm(prefix + name))
        return block

    def attention(self, layer: int) -> Attention:
        spec, prefix = self.spec, layer_prefix(layer) + "attention."
        whole = spec.qk_norm == "full"
        return Attention(
            kernels=self.kernels,
            qkv=self.linear(prefix + "q", prefix + "k", prefix + "v"),
            o=self.linear(prefix + "o"),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.attention_scale,
            window=spec.windows[layer],
            head_norms=self.head_norms(prefix) if spec.qk_norm == "head" else None,
            q_norm=self.rms_norm(prefix + "q_norm") if whole else None,
            k_norm=self.rms_norm(prefix + "k_norm") if whole else None,
        )

    def mlp(self, layer: int) -> MLP:
        spec, prefix = self.spec, layer_prefix(layer) + "mlp."
        if spec.gated_mlp:
            gate_up = self.linear(prefix + "gate", prefix + "up")
            return GatedMLP(self.kernels, gate_up, self.linear(prefix + "down"), spec.activation)
        return PlainMLP(self.kernels, self.linear(prefix + "up"), self.linear(prefix + "down"), spec.activation)

    def linear(self, *parts: str) -> Linear:
        """The parts' rows stacked into one product."""
        bias = None
        if f"{parts[0]}.bias" in self.shapes:
            bias = torch.cat([self.tensor(f"{part}.bias", torch.float32) for part in parts])
        rows = self.blocks(*parts)
        if rows is not None and (linear := self.pack_blocks(rows, bias)) is not None:
            return linear
        weight = stack([self.tensor(f"{part}.weight", self.dtype) for part in parts])
        if self.quantization is not None and parts[0].startswith("layers."):
            return self.counted(self.quantised(weight, bias, self.quantization))
        return self.counted(self.kernels.pack_linear(weight, bias))

    def quantised(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear:
        linear = self.kernels.quantise_linear(weight, bias, name)
        if linear is None:
            raise ConfigError(f"the {self.kernels.name} kernels have no {name} layers: leave quantization out")
        return linear

    def blocks(self, *parts: str) -> QuantisedRows | None:
        """The parts' rows as the file has them, if they shall stay so and their types allow."""
        if not self.keep_quantised:
            return None
        rows = [found for part in parts if (found := self.weights.blocks(f"{part}.weight")) is not None]
        return stacked(rows) if len(rows) == len(parts) else None

    def pack_blocks(self, rows: QuantisedRows, bias: Tensor | None) -> Linear | None:
        linear = self.kernels.pack_quantised(rows.raw, rows.quant_type, bias)
        if linear is None:
            return None
        self.packed_types.add(rows.quant_type)
        self.report(prod(rows.shape))
        return self.counted(linear)

    def counted(self, linear: Linear) -> Linear:
        self.count(linear.nbytes)
        return linear

    def count(self, nbytes: int) -> None:
        with self.lock:
            self.weight_bytes += nbytes

    def norm(self, name: str) -> Norm:
        weight = self.tensor(f"{name}.weight", torch.float32).clone()  # not the mapped file
        bias = self.tensor(f"{name}.bias", torch.float32).clone() if self.spec.norm_bias else None
        return make_norm(self.kernels, self.spec.norm, weight, bias, self.spec.norm_eps)

    def post_norm(self, name: str) -> PostNorm:
        """A norm behind a half of a block: left to the sum that follows, where that is one kernel."""
        if not self.kernels.defers_sums or self.spec.norm != "rms":
            return self.norm(name)
        weight = self.tensor(f"{name}.weight", torch.float32).clone()
        return DeferredRMSNorm(self.kernels, weight, self.spec.norm_eps)

    def head_norms(self, prefix: str) -> HeadNorms:
        q, k = (self.tensor(f"{prefix}{name}.weight", torch.float32).clone() for name in ("q_norm", "k_norm"))
        return HeadNorms(q, k, self.spec.norm_eps)

    def rms_norm(self, name: str) -> Norm:
        weight = self.tensor(f"{name}.weight", torch.float32).clone()
        return make_norm(self.kernels, "rms", weight, None, self.spec.norm_eps)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.weights.read(name, dtype).to(self.device)
        self.report(tensor.numel())
        return tensor

    def report(self, parameters: int) -> None:
        with self.lock:
            self.loaded += parameters
            if self.progress is not None:
                self.progress(self.loaded, self.total)

    def _holds(self, name: str) -> bool:
        """Whether this stage reads the weight."""
        if name.startswith("layers."):
            return int(name.split(".", 2)[1]) in self.layers
        first, last = self.layers.start == 0, self.layers.stop == self.spec.num_layers
        if name.startswith("embedding."):
            return first or (last and self.spec.tied_embeddings)
        return first if name.startswith("positions.") else last


@contextmanager
def one_thread_per_layer(kernels: Kernels) -> Iterator[ThreadPoolExecutor]:
    """Layers are read side by side, each by one thread from end to end: many small steps that all threads had to
    finish together would wait for the slowest at each, tenfold on a busy machine."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="foretell-load")
    torch.set_num_threads(1)
    kernels.set_threads(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
