"""What describes the rows of one publication: ledger, statistics and manifest, in a subgroup that never changes.

The subgroup is named after its content. So an interrupted publication leaves the older one whole, and two of them
never mix.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from cvae_dist.errors import Corrupt
from cvae_dist.store.columns import Columns
from cvae_dist.store.layout import (
    DTYPES,
    STRING,
    ArrayLayout,
    Block,
    array_metadata,
    decode_chunk,
    encode_chunk,
    group_metadata,
    shard_key,
)
from cvae_dist.store.urls import Location

PUBLICATIONS = "publications"
METADATA = "zarr.json"
_CHUNK_BYTES = 8_000_000
_THREADS = 8

Input = TypeVar("Input")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """What the group's document says of one array of the publication: NumPy code or "string", shape, rows a chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunk: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> Self:
        """Choose chunks of about 8 MB."""
        width = (64 if dtype == STRING else np.dtype(dtype).itemsize) * math.prod(shape[1:])
        return cls(dtype, shape, max(1, min(shape[0], _CHUNK_BYTES // max(1, width))))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``asdict`` made; ``ValueError`` when it is something else."""
        stored = cls(str(document["dtype"]), tuple(map(int, document["shape"])), int(document["chunk"]))
        if stored.chunk < 1 or min(stored.shape) < 0 or stored.dtype not in (STRING, *DTYPES):
            raise ValueError(f"an array of the publication is {stored}")
        return stored

    @property
    def chunks(self) -> int:
        """Objects that hold the array."""
        return -(-self.shape[0] // self.chunk)


class Publication:
    """The subgroup of one publication of a store."""

    def __init__(self, store: Location, name: str, arrays: Mapping[str, Stored]) -> None:
        self.path = f"{PUBLICATIONS}/{name}"
        self.arrays = dict(arrays)
        self._members: dict[str, Any] = {}
        self.store = store
        self._place = store / PUBLICATIONS / name

    def write(self, name: str, values: Block, dims: tuple[str, ...], **attributes: Any) -> None:
        """Write a whole array that fits in memory."""
        stored = Stored.of(_code(values), values.shape)
        blocks = (values[first : first + stored.chunk] for first in range(0, len(values), stored.chunk))
        self.write_blocks(name, stored, blocks, dims, **attributes)

    def write_blocks(
        self, name: str, stored: Stored, blocks: Iterator[Block], dims: tuple[str, ...], **attributes: Any
    ) -> None:
        """Write an array that comes in blocks, one for each chunk."""
        parts = ((name, number, block, stored.chunk) for number, block in enumerate(blocks))
        self._write_chunks(parts)
        self._describe(name, stored, dims, attributes)

    def write_columns(self, dtypes: Mapping[str, str], batches: Iterable[Columns], dim: str) -> None:
        """Write a table whose length nobody knows before: an array for each column, named as ``dtypes`` are, in order.

        The first batch is a chunk of each, and so is every other; only the last one may be smaller.
        """
        chunk = rows = 0

        def parts() -> Iterator[tuple[str, int, Block, int]]:
            nonlocal chunk, rows
            for number, batch in enumerate(batches):
                chunk, rows = chunk or len(batch), rows + len(batch)
                for name, values in zip(dtypes, batch.columns().values(), strict=True):
                    yield name, number, values, chunk

        self._write_chunks(parts())
        for name, dtype in dtypes.items():
            self._describe(name, Stored(dtype, (rows,), max(1, chunk)), (dim,), {})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Block:
        """Return entries ``start:stop`` of an array.

        Raises
        ------
        Corrupt
            It is missing, torn or changed.
        """
        stored = self.arrays[name]
        stop = stored.shape[0] if stop is None else stop
        first, last = start // stored.chunk, -(-stop // stored.chunk)
        if first >= last:
            return np.zeros((0, *stored.shape[1:]), object if stored.dtype == STRING else stored.dtype)
        chunks = self._each(lambda chunk: self._read_chunk(name, stored, chunk), range(first, last))
        block = np.concatenate(list(chunks))
        return block[start - first * stored.chunk : stop - first * stored.chunk]

    def read_columns(self, names: Iterable[str], start: int, stop: int) -> Iterator[Block]:
        """Yield entries ``start:stop`` of several arrays, asked for at once where a storage is waited for."""
        return self._each(lambda name: self.read(name, start, stop), names)

    def blocks(self, name: str) -> Iterator[Block]:
        """Yield an array chunk by chunk; see :meth:`read`."""
        stored = self.arrays[name]
        for start in range(0, stored.shape[0], stored.chunk):
            yield self.read(name, start, min(start + stored.chunk, stored.shape[0]))

    def finish(self) -> Mapping[str, Any]:
        """Write the metadata of the subgroup, and return that of all its members by path."""
        for path in (PUBLICATIONS, self.path):
            self._write_metadata(path, group_metadata())
        return self._members

    def _write_chunks(self, parts: Iterable[tuple[str, int, Block, int]]) -> None:
        """Write chunks: array, number, what it holds, and its rows."""

        def write(part: tuple[str, int, Block, int]) -> None:
            name, number, block, rows = part
            (self._place / name / shard_key(number, block.ndim)).write(*encode_chunk(block, rows))

        for _ in self._each(write, parts):
            pass

    def _each(self, function: Callable[[Input], Result], inputs: Iterable[Input]) -> Iterator[Result]:
        """Yield what a function makes of every input, in order; at once where a storage is waited for.

        On a disk threads take longer to start than most publications to write, and each keeps memory of its own.
        """
        return map(function, inputs) if self.store.is_local else mapped(function, inputs)

    def _describe(self, name: str, stored: Stored, dims: tuple[str, ...], attributes: Mapping[str, Any]) -> None:
        self._write_metadata(f"{self.path}/{name}", self._metadata(name, stored, dims, attributes))
        self.arrays[name] = stored

    def _write_metadata(self, path: str, data: bytes) -> None:
        (self.store / path / METADATA).write(data)
        self._members[path] = json.loads(data)

    def _read_chunk(self, name: str, stored: Stored, chunk: int) -> Block:
        place = self._place / name / shard_key(chunk, len(stored.shape))
        try:
            return decode_chunk(place.read(), stored.dtype, (stored.chunk, *stored.shape[1:]))
        except (FileNotFoundError, NotADirectoryError):
            what = "is missing"
        except (ValueError, RuntimeError) as error:
            what = f"cannot be trusted: {error}"
        raise Corrupt(
            f"{place} {what}. It describes the published rows, so nothing is known of them. If the store has "
            "grown since it was opened, open it again; else put the object back from a copy, or make the store "
            "anew with --overwrite"
        )

    def _metadata(self, name: str, stored: Stored, dims: tuple[str, ...], attributes: Mapping[str, Any]) -> bytes:
        array = ArrayLayout(name, stored.dtype, dims, stored.shape[1:], attributes)
        return array_metadata(array, stored.shape[0], stored.chunk, compressed=True)


def _code(values: Block) -> str:
    return STRING if values.dtype.kind in "OUT" else values.dtype.newbyteorder("<").str


def mapped(function: Callable[[Input], Result], inputs: Iterable[Input]) -> Iterator[Result]:
    """Yield what a function makes of every input, in order, some at a time: most of it is waiting for the storage."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for value in inputs:
            pending.append(pool.submit(function, value))
            if len(pending) == 2 * _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
