"""Where requests go: an address in parts, and the head that every request to it shares."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from foretell.errors import ConfigError

USER_AGENT = "foretell-bench"


@dataclass(frozen=True, slots=True)
class Target:
    """``prefix`` stands before /v1 in every path."""

    host: str
    port: int
    tls: bool
    prefix: str
    api_key: str | None = None

    @classmethod
    def parse(cls, base_url: str, api_key: str | None = None) -> Target:
        """ "http://host:8000", with or without /v1 at its end. ConfigError for anything else."""
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError as error:
            raise ConfigError(f"--base-url {base_url!r} is no address: {error}") from None
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ConfigError(f"--base-url {base_url!r} is no address: write http://127.0.0.1:8000")
        if url.username is not None or url.password is not None:
            raise ConfigError("--base-url holds a user or password: a key goes into --api-key or OPENAI_API_KEY")
        if not base_url.isascii() or not base_url.isprintable() or " " in base_url:
            raise ConfigError("--base-url holds characters that no address has")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key holds characters that no HTTP header can carry")
        tls = url.scheme == "https"
        prefix = url.path.rstrip("/").removesuffix("/v1")
        return cls(url.hostname, port or (443 if tls else 80), tls, prefix, api_key)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self._authority}{self.prefix}"

    @property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context() if self.tls else None

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole HTTP/1.1 request; ``path`` begins with /v1."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self._authority}", f"User-Agent: {USER_AGENT}"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii") + body
