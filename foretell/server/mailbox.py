"""One request's updates on their way from the engine to whoever reads them."""

from __future__ import annotations

import asyncio

from foretell.tracking import Update


class Mailbox:
    """Holds at most one update for each output: what a slow reader has not taken yet grows together, so that its
    memory is bounded by the text itself. One reader; belongs to one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._updates: dict[int, Update] = {}  # by output, oldest first
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, update: Update) -> None:
        """Never blocks. Nothing is taken after an error."""
        if self._error is not None:
            return
        if update.error is not None:
            self.fail(update.error)
            return
        held = self._updates.get(update.index)
        if held is None:
            self._updates[update.index] = update
            self._wake()
        else:
            held.delta_text += update.delta_text
            held.delta_token_ids = [*held.delta_token_ids, *update.delta_token_ids]
            held.finish_reason = update.finish_reason

    async def get(self) -> Update:
        """The next update. Raises the error once the updates that came before it are taken."""
        while not self._updates:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._updates.pop(next(iter(self._updates)))

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._wake()

    def fail_after(self, seconds: float | None) -> asyncio.TimerHandle | None:
        """A TimeoutError for the reader when so many seconds have passed."""
        return None if seconds is None else self._loop.call_later(seconds, self.fail, TimeoutError())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
