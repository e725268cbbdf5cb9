"""What the server allows: where it listens, who may ask, and how much. Safe as it is; every limit can be changed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from typing import Literal

from foretell.errors import ConfigError

MIN_KEY_CHARS = 8


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Frozen and checked once. Lengths are in the unit their name says; ConfigError names what is wrong.

    Without ``api_keys`` the server listens on loopback only and answers only requests whose Host header is a
    loopback name (or one of ``allowed_hosts``), so that no web page can reach it through a name of its own;
    with ``allow_anyone`` it may listen elsewhere and answers to addresses as well.
    ``admin_api_keys`` open the admin routes; if there are none, ``api_keys`` do; if there are none either, nobody.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    admin_api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allow_anyone: bool = False  # to listen beyond loopback without a key
    served_model_names: tuple[str, ...] = ()  # empty: the name the engine was started with

    embedding_pooling: Literal["mean", "last"] = "mean"  # of the hidden states

    max_body_bytes: int = 4 << 20
    max_json_depth: int = 64
    max_json_values: int = 262_144  # in one body: token ids mostly
    max_object_keys: int = 8192  # in one object of it
    body_timeout_seconds: float = 30.0
    max_prompt_chars: int = 1_000_000  # of one prompt, or of one conversation as the template renders it
    max_prompts: int = 128  # in one request
    max_inputs: int = 2048  # of one embeddings request
    max_n: int = 16
    max_outputs: int = 256  # prompts times n of one request
    max_messages: int = 4096
    max_logprobs: int = 20
    max_prompt_logprobs: int = 20
    max_stops: int = 16
    max_stop_chars: int = 256
    max_bad_words: int = 128
    max_token_list: int = 4096  # entries of logit_bias, allowed_token_ids and stop_token_ids
    max_tools: int = 128
    max_tool_bytes: int = 1 << 20  # all tools together; coding agents describe theirs in 50 to 200 KiB
    max_schema_bytes: int = 64 << 10  # a JSON schema, regex, grammar or list of choices
    max_schema_depth: int = 32
    max_template_kwargs: int = 16
    max_queue: int = 1024  # unfinished requests; one more gets 429
    stored_responses: int = 1024  # answers of /v1/responses kept in memory for later requests; 0 keeps none
    stored_response_bytes: int = 32 << 20  # of all of them
    default_timeout_seconds: float | None = 600.0
    max_timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("api_keys", "admin_api_keys", "allowed_hosts", "served_model_names"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is a list of texts, got one text: write ({name[:-1]},)")
        for key in (*self.api_keys, *self.admin_api_keys):
            if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key needs at least {MIN_KEY_CHARS} printable ASCII characters without spaces"
                )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if not (self.api_keys or self.allow_anyone or is_loopback(self.host)):
            raise ConfigError(
                f"listening on {self.host} without a key would let anyone in: give an API key, or listen on 127.0.0.1"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(("max_", "body_", "default_")) and value is not None and not value > 0:
                raise ConfigError(f"{field.name} must be above 0, got {value!r}")
        if self.stored_responses < 0 or self.stored_response_bytes < 0:
            raise ConfigError("stored_responses and stored_response_bytes must not be below 0")
        if self.default_timeout_seconds is not None and self.default_timeout_seconds > self.max_timeout_seconds:
            raise ConfigError("default_timeout_seconds is larger than max_timeout_seconds")


def is_address(host: str) -> bool:
    """Whether it is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a host to listen on, or the host part of a Host header, is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
