"""Options that several commands share, each said once: its name, its help, the panel it stands in.

A dataclass of them is a group, which a command takes as one parameter (``groups``). Fields of engine groups are named
as in ``EngineOptions``, those of sampling as in ``SamplingParams``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foretell.cli.session import sampling
from foretell.cli.units import parse_bytes

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams

_SAMPLING, _ENGINE = "Choosing tokens", "Engine"

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
QuantizationName = Literal["int8", "int4", "fp8"]
KVCacheDtypeName = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

Model = Annotated[str, typer.Argument(help="Alias, folder, .gguf file, repository id or pypi:name==version.")]

MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens to generate.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", "-t", min=0, help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float, typer.Option(help="Keep tokens with p ≥ this share of the likeliest's p.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", "-s", help="End the output before this text; may be repeated.", rich_help_panel=_SAMPLING),
]
System = Annotated[str | None, typer.Option(help="System message that opens the conversation.")]

Dtype = Annotated[DtypeName, typer.Option(help="Number format of weights and KV cache.", rich_help_panel=_ENGINE)]
Format = Annotated[
    LoadFormat,
    typer.Option("--load-format", help="Weight files to read; dummy: random weights.", rich_help_panel=_ENGINE),
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Longest prompt + output, in tokens.", rich_help_panel=_ENGINE)
]
KVCacheBytes = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-bytes",
        parser=parse_bytes,
        metavar="SIZE",
        help="Memory for keys and values: 512MiB, 2G, …",
        rich_help_panel=_ENGINE,
    ),
]
Quantization = Annotated[
    QuantizationName | None,
    typer.Option(help="Round linear layers to fewer bits while loading (GPU).", rich_help_panel=_ENGINE),
]
KVCacheDtype = Annotated[
    KVCacheDtypeName,
    typer.Option("--kv-cache-dtype", help="fp8: keys and values in 8 bits (GPU).", rich_help_panel=_ENGINE),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, help="Most requests in one step; 64, within the token budget.", rich_help_panel=_ENGINE),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option("--max-num-batched-tokens", min=1, help="Most tokens in one step.", rich_help_panel=_ENGINE),
]
PolicyChoice = Literal["auto", "prefill-first", "decode-first", "mixed"]
Policy = Annotated[
    PolicyChoice,
    typer.Option(help="Who goes first in a step; auto: mixed, prompts on a GPU run.", rich_help_panel=_ENGINE),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; all if not given.", rich_help_panel=_ENGINE)
]
KernelsName = Annotated[
    str, typer.Option("--kernels", help="auto, cpu (C++), cuda or reference (torch).", rich_help_panel=_ENGINE)
]
Device = Annotated[DeviceName, typer.Option(help="auto: a GPU where there is one.", rich_help_panel=_ENGINE)]
MemoryShare = Annotated[
    float, typer.Option(min=0.01, max=1, help="Of a GPU's memory, for everything.", rich_help_panel=_ENGINE)
]
TP = Annotated[
    int,
    typer.Option("--tp", min=1, help="Tensor parallelism: ranks that share every layer.", rich_help_panel=_ENGINE),
]
PP = Annotated[
    int,
    typer.Option("--pp", min=1, help="Pipeline parallelism: stages that share the layers.", rich_help_panel=_ENGINE),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Never touch the network; use what is here.", rich_help_panel=_ENGINE)
]
JsonOutput = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead.")]


@dataclass(frozen=True)
class Sampling:
    max_tokens: MaxTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    seed: Seed = None
    stop: Stop = None

    def given(self) -> dict[str, Any]:
        """What was chosen, by the names of SamplingParams."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self, **more: Any) -> SamplingParams:
        return sampling(**self.given(), **more)


class EngineGroup:
    """A group whose fields are some of EngineOptions'."""

    def options(self) -> dict[str, Any]:
        chosen = asdict(self)  # type: ignore[call-overload]  # its subclasses are dataclasses
        if "offline" in chosen:
            chosen["offline"] = chosen["offline"] or None  # None: as the environment says
        return dict(chosen)


@dataclass(frozen=True)
class Weights(EngineGroup):
    """What is loaded, and what computes with it."""

    dtype: Dtype = "auto"
    load_format: Format = "auto"
    num_threads: Threads = None
    kernels: KernelsName = "auto"
    device: Device = "auto"
    memory_share: MemoryShare = 0.9
    quantization: Quantization = None
    kv_cache_dtype: KVCacheDtype = "auto"
    offline: Offline = False


@dataclass(frozen=True)
class Capacity(EngineGroup):
    """How much may run at once, and in which order."""

    max_model_len: MaxModelLen = None
    kv_cache_bytes: KVCacheBytes = None
    max_num_seqs: MaxNumSeqs = None
    max_num_batched_tokens: MaxBatchedTokens = None
    policy: Policy = "auto"


@dataclass(frozen=True)
class Engine(Capacity, Weights):
    """All that every command with an engine takes."""

    tp: TP = 1
    pp: PP = 1
