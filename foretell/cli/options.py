"""Options that several commands share, each said once: its name, its help, the panel it stands in."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from foretell.cli.units import parse_bytes
from foretell.config import PolicyName

_SAMPLING, _ENGINE = "Choosing tokens", "Engine"

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

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
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, help="Most requests in one step; 64, within the token budget.", rich_help_panel=_ENGINE),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option("--max-num-batched-tokens", min=1, help="Most tokens in one step.", rich_help_panel=_ENGINE),
]
Policy = Annotated[PolicyName, typer.Option(help="Who goes first in a step.", rich_help_panel=_ENGINE)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all if not given.", rich_help_panel=_ENGINE)]
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
