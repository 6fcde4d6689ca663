"""The requests of one batch, side by side: whole objects, ranges of large ones, deletes and listings.

Coroutines over ``obstore``; :class:`~kvstrata.tiers.s3.tier.S3Tier` runs each batch to its end under one deadline.
The client's own exceptions leave this module untranslated, except that an absent object is a value.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from kvstrata.errors import TierUnavailable
from kvstrata.types import Miss, MissReason

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

log = logging.getLogger(__name__)

STREAM_BYTES = 1 << 20
"""Pieces in which a body reaches Python: each is copied to its place while the next one arrives."""
BULK_DELETE = 1000
"""Objects of one DeleteObjects request."""

T = TypeVar("T")


class Requests:
    """What is asked of one bucket. Its coroutines may run in several threads, each with its own event loop."""

    def __init__(self, store: S3Store, *, max_requests: int, part_bytes: int) -> None:
        self._open_store: S3Store | None = store
        self._max_requests = max_requests
        self._part_bytes = part_bytes
        self._ranges = True
        """Whether the server answers a request for a range with a range."""

    @property
    def _store(self) -> S3Store:
        if self._open_store is None:
            raise TierUnavailable("the tier was closed")
        return self._open_store

    def close(self) -> None:
        """Drop the client. To drop this object is not enough: the library may hold on to finished coroutines, and
        through them to it, until its next call."""
        self._open_store = None

    async def check(self, directory: str) -> None:
        """Ask for something small that only an existing bucket with our permissions answers."""
        await obstore.list_with_delimiter_async(self._store, directory or None)

    def pages(self, directory: str) -> Iterator[list[str]]:
        """The names of all objects below ``directory``, page by page. Blocks; a page has the client's timeout."""
        for page in obstore.list(self._store, directory or None, chunk_size=1000):
            yield [entry["path"] for entry in page]

    async def heads(self, names: Sequence[str]) -> list[bool]:
        """Which objects exist."""

        async def head(name: str) -> bool:
            try:
                await obstore.head_async(self._store, name)
            except FileNotFoundError:
                return False
            return True

        return await self._side_by_side([head(name) for name in names])

    async def get(self, names: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """Each object to the start of its buffer: its size, or a miss."""
        return await self._side_by_side(
            [self._get(name, buffer) for name, buffer in zip(names, buffers, strict=True)]
        )

    async def _get(self, name: str, buffer: memoryview) -> int | Miss:
        """One object; by ranges side by side when it may be large."""
        try:
            if len(buffer) > self._part_bytes and self._ranges:
                size = await self._get_parts(name, buffer)
                if size is not None:
                    return size
            return await _copy_whole(await obstore.get_async(self._store, name), buffer)
        except FileNotFoundError:
            return Miss(MissReason.ABSENT)

    async def _get_parts(self, name: str, buffer: memoryview) -> int | Miss | None:
        """One object by ranges; None when it must be read as a whole.

        The answer to the first range tells the size and the entity tag; the others are asked for under that tag, so
        that they are parts of the same object even while it is being replaced.
        """
        part = self._part_bytes
        try:
            first = await obstore.get_async(self._store, name, options={"range": (0, part)})
        except BaseError as error:
            # An empty object has no first range (416); a server that ignores ranges answers with the whole (200).
            if "416" not in str(error):
                self._no_ranges(error)
            return None
        size, tag = first.meta["size"], first.meta["e_tag"]
        if size > len(buffer):
            return _too_large(first, buffer)
        if size > part and tag is None:
            _leave(first)
            return None

        async def get_range(start: int) -> None:
            end = min(start + part, size)
            options: GetOptions = {"range": (start, end), "if_match": tag}
            await _copy(await obstore.get_async(self._store, name, options=options), buffer[start:end])

        rest = [get_range(start) for start in range(part, size, part)]
        parts = [asyncio.ensure_future(each) for each in (_copy(first, buffer[: min(part, size)]), *rest)]
        try:
            await asyncio.gather(*parts)
        except PreconditionError:
            return None
        finally:  # none of them goes on: the buffer is about to be filled anew
            for each in parts:
                each.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        return size

    def _no_ranges(self, error: BaseError) -> None:
        if "non-partial" not in str(error):
            raise error
        self._ranges = False
        log.warning("the S3 server ignores the Range header: large objects are read over one connection")

    async def put(self, names: Sequence[str], frames: Sequence[memoryview], multipart_bytes: int) -> None:
        """Each frame as an object, which replaces what was there at once or not at all."""

        async def put(name: str, frame: memoryview) -> None:
            await obstore.put_async(
                self._store,
                name,
                # A copy: a request that is given up may read its memory a moment longer than its caller owns it.
                bytes(frame),
                use_multipart=len(frame) > multipart_bytes,
                chunk_size=self._part_bytes,
            )

        await self._side_by_side([put(name, frame) for name, frame in zip(names, frames, strict=True)])

    async def delete(self, names: Sequence[str]) -> int:
        """Delete objects; how many there were. The bulk request itself does not tell."""
        held = [name for name, is_held in zip(names, await self.heads(names), strict=True) if is_held]
        for start in range(0, len(held), BULK_DELETE):
            await obstore.delete_async(self._store, held[start : start + BULK_DELETE])
        return len(held)

    async def _side_by_side(self, requests: Sequence[Coroutine[object, object, T]]) -> list[T]:
        """Run all, at most ``max_requests`` at a time."""
        if len(requests) <= self._max_requests:
            return await asyncio.gather(*requests)
        gate = asyncio.Semaphore(self._max_requests)

        async def wait(request: Coroutine[object, object, T]) -> T:
            async with gate:
                return await request

        return await asyncio.gather(*(wait(request) for request in requests))


async def _copy_whole(result: GetResult, buffer: memoryview) -> int | Miss:
    size = result.meta["size"]
    if size > len(buffer):
        return _too_large(result, buffer)
    await _copy(result, buffer[:size])
    return size


async def _copy(result: GetResult, buffer: memoryview) -> None:
    """A body of exactly the buffer's size. One copy: no S3 client for Python reads into the caller's memory."""
    position = 0
    async for part in result.stream(min_chunk_size=STREAM_BYTES):
        if len(part) <= len(buffer) - position:
            buffer[position : position + len(part)] = part
        position += len(part)
    if position != len(buffer):
        raise ConnectionResetError(f"a body of {position} bytes, {len(buffer)} announced")


def _too_large(result: GetResult, buffer: memoryview) -> Miss:
    _leave(result)
    return Miss(MissReason.CORRUPT, f"object of {result.meta['size']} bytes for a buffer of {len(buffer)}")


def _leave(result: GetResult) -> None:
    """Do without the body. The library may hold on to an answer until its next call, and so to a connection on
    which the body waits; the stream that is taken out of it here, and not kept, it does not hold."""
    result.stream()
