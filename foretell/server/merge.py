"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """(number of the stream, item) as items come. The first failure ends all; so does leaving."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for item in only:
                yield 0, item
        return
    news: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(maxsize=4 * len(streams))
    tasks = [asyncio.ensure_future(_forward(number, stream, news)) for number, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            pair = await news.get()
            if isinstance(pair, BaseException):
                raise pair
            if pair is None:
                left -= 1
            else:
                yield pair
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    number: int, stream: AsyncIterator[T], news: asyncio.Queue[tuple[int, T] | BaseException | None]
) -> None:
    try:
        async with aclosing(stream) as items:  # type: ignore[type-var]
            async for item in items:
                await news.put((number, item))
        await news.put(None)
    except Exception as error:
        await news.put(error)
