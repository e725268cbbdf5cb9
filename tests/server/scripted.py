"""An engine whose model says what it is told to: for what the weights of a tiny model would never say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from foretell.output import CompletionOutput, RequestMetrics, RequestOutput
from foretell.server.local_engine import LocalTextEngine
from foretell.tracking import Update


class ScriptedEngine:
    """Answers the n-th request with the n-th text, ``chars`` characters to an update; the last text again and again.
    ``prompts`` holds what was asked, as text."""

    def __init__(self, engine: LocalTextEngine, texts: Sequence[str], chars: int = 3, reason: str = "stop") -> None:
        self.engine, self.texts, self.chars, self.reason = engine, list(texts), chars, reason
        self.prompts: list[str] = []
        self.abandoned = 0  # answers whose reader left before their end

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def stream(self, prompt: Any, params: Any, **options: Any) -> AsyncIterator[Update]:
        assert self.engine.tokenizer is not None
        self.prompts.append(self.engine.tokenizer.decode(prompt, skip_special_tokens=False))
        text = self.texts[min(len(self.prompts), len(self.texts)) - 1]
        answer = CompletionOutput(0)
        output = RequestOutput(len(self.prompts), None, list(prompt), [answer], RequestMetrics(0.0))
        pieces = [text[i : i + self.chars] for i in range(0, len(text), self.chars)] or [""]
        try:
            for number, piece in enumerate(pieces, start=1):
                answer.text += piece
                answer.token_ids.append(0)
                answer.finish_reason = self.reason if number == len(pieces) else None
                yield Update(output, 0, piece, (0,), answer.finish_reason)
                await asyncio.sleep(0)  # others have their turn, as after each token of a real engine
        finally:
            self.abandoned += answer.finish_reason is None
