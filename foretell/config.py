"""Frozen configuration, resolved once. No torch here: the planner and the simulator read these too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich"]
QKNorm = Literal["none", "head", "full"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), with the context-extension scalings in use.

    ``dim`` is the rotated part of each head (partial rotary when smaller than head_dim).
    ``attention_factor`` multiplies cos and sin (YaRN, Peng et al. 2023). ``freq_divisors`` gives the
    slowing-down of each pair outright (GGUF's rope_freqs), in place of a scaling rule.
    """

    theta: float
    dim: int
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    freq_divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about an architecture that the transformer, the cost model and `inspect` need.

    MHA, GQA and MQA differ in ``num_kv_heads`` alone. ``windows[i]`` is layer i's sliding window in
    tokens (a query sees keys at distance < window), or None for full attention; layers with a window
    use ``local_rope`` where one is given.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_placement: NormPlacement = "pre"
    norm_bias: bool = False
    parallel_block: bool = False
    shared_block_norm: bool = False  # parallel block whose two halves read one norm (falcon 7b)
    qk_norm: QKNorm = "none"
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    rope: RopeSpec | None = None
    local_rope: RopeSpec | None = None
    learned_positions: int = 0  # rows of the position table; 0 when positions are rotary
    attention_scale: float = 0.0  # multiplies Q·Kᵀ; resolved by the family, 1/√head_dim as a rule
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    tied_embeddings: bool = False

    @property
    def query_heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def attention_kind(self) -> Literal["MHA", "GQA", "MQA"]:
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """KV-cache bytes one token takes in all layers: 2 (K and V) · layers · KV heads · head_dim · bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers that keep the same stretch of history share block tables: one group per distinct window."""
        windows = sorted(set(self.windows), key=lambda w: (w is not None, w or 0))
        return tuple(
            KVGroup(window=w, layers=tuple(i for i, v in enumerate(self.windows) if v == w)) for w in windows
        )


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with one block table: all full-attention layers, or all layers of one sliding window (tokens)."""

    window: int | None
    layers: tuple[int, ...]


PolicyName = Literal["prefill-first", "decode-first", "mixed"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the scheduler may do in one step. Tokens and blocks are counts; ages are in scheduling turns."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    max_chunk_tokens: int = 0  # cap of one request's prefill chunk; 0: the token budget is the cap
    block_size: int = 16
    policy: PolicyName = "mixed"
    enable_prefix_caching: bool = True
    watermark: float = 0.01  # share of blocks that admission leaves free for running requests
    starvation_turns: int = 64  # after being passed over this often, a request goes first
    admission_batch: int = 1  # once all sequences are in use, wait for so many to be free, or for so many turns
