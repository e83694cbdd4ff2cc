"""What a Zarr array says of itself, in either format: checked before any codec that it names is run."""

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from cvae_dist.errors import InvalidInput
from cvae_dist.sources.files import File
from cvae_dist.store.lineage import digest_json
from cvae_dist.store.urls import Location

METADATA = ("zarr.json", ".zarray")  # what makes a folder an array, by format
_ATTRIBUTES = ".zattrs"
# They turn bytes into numbers or texts and do nothing else. Others may run code, as pickle does.
_CODECS = (
    "adler32", "bitround", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian", "fixedscaleoffset",
    "fletcher32", "gzip", "lz4", "lzma", "packbits", "sharding_indexed", "shuffle", "transpose", "vlen-utf8", "zlib",
    "zstd",
)  # fmt: skip
_REGISTERED = "numcodecs."  # so format 3 names the codecs of format 2
_MEANING = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")
_MOST_DECODED = 2_000_000_000  # bytes of what is decoded at once


@dataclass(frozen=True)
class ArrayMetadata:
    """An array of numbers or texts, all of whose codecs are harmless.

    Attributes
    ----------
    place : Location
        Its folder.
    documents : Mapping
        The files of metadata by name.
    """

    place: Location
    documents: Mapping[str, bytes] = field(hash=False)

    @classmethod
    def find(cls, place: Location) -> Self | None:
        """Return the array at a place, None where there is none.

        Raises
        ------
        InvalidInput
            Its metadata is damaged, or names a codec that is not known to be harmless.
        """
        read = {name: _read(place / name) for name in (*METADATA, _ATTRIBUTES)}
        found = cls(place, {name: data for name, data in read.items() if data is not None})
        if not {*METADATA} & {*found.documents}:
            return None
        try:
            if found._document.get("node_type", "array") != "array":
                return None
            found._require_harmless()
            found._require_sane()
        except InvalidInput:
            raise
        except Exception as error:  # Zarr lets many kinds through where the metadata is garbage
            why = (str(error).splitlines() or [""])[0]
            raise InvalidInput(
                f"{place} has unusable Zarr metadata ({type(error).__name__}: {why}), so nothing of it was read; "
                "get it from a copy, or mend the path"
            ) from error
        return found

    def opened(self, files: Mapping[str, File]) -> "zarr.Array[Any]":
        """Return the array, which consists of these objects by name; others are taken as missing."""
        return zarr.open_array(_Objects(self.documents, files), mode="r", zarr_format=3 if self._is_v3 else 2)

    @cached_property
    def array(self) -> "zarr.Array[Any]":
        """The array without any object, for what it says of itself."""
        return self.opened({})

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored; that of texts is object."""
        dtype = np.dtype(self.array.dtype)
        return np.dtype(object) if dtype.kind in "OTU" else dtype

    @property
    def is_numeric(self) -> bool:
        """Whether it holds real numbers of at most 8 bytes."""
        return self.dtype.kind in "iuf" and self.dtype.itemsize <= 8

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Attributes, with the fill value of xarray's data sets as it is meant."""
        if not self._is_v3:
            found = dict(json.loads(self.documents.get(_ATTRIBUTES, b"{}")))
            meant = "_ARRAY_DIMENSIONS" in found and self.array.fill_value is not None
            return {**found, "_FillValue": self.array.fill_value} if meant else found
        found = dict(self._document.get("attributes") or {})
        if isinstance(mark := found.get("_FillValue"), str) and self.dtype.kind == "f":
            (found["_FillValue"],) = struct.unpack("<d", base64.standard_b64decode(mark))
        return found

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of what one stored object holds: a chunk, or a shard of several."""
        return self.array.shards or self.array.chunks

    @property
    def blocks(self) -> tuple[int, ...]:
        """Stored objects along each axis."""
        return tuple(-(-n // block) for n, block in zip(self.array.shape, self.block_shape, strict=True))

    @cached_property
    def digest(self) -> str:
        """Digest of what gives stored bytes their meaning; it stays when the array grows along its first axis."""
        kept = {name: value for name, value in self._document.items() if name != "attributes"}
        meaning = {name: str(self.attributes.get(name)) for name in _MEANING}
        return digest_json({**kept, "shape": list(self.array.shape[1:]), "meaning": meaning})

    def key(self, block: tuple[int, ...]) -> str:
        """Return the name of a stored object."""
        return self.array.metadata.encode_chunk_key(block)

    @property
    def _is_v3(self) -> bool:
        return METADATA[0] in self.documents

    @cached_property
    def _document(self) -> dict[str, Any]:
        return dict(json.loads(self.documents[METADATA[0] if self._is_v3 else METADATA[1]]))

    def _require_harmless(self) -> None:
        document = self._document
        listed = document.get("codecs") or [document.get("compressor"), *(document.get("filters") or [])]
        names = {name.removeprefix(_REGISTERED) for name in _names(listed)}
        if strange := sorted(names - {*_CODECS}):
            raise InvalidInput(
                f"{self.place} is stored with the codec {', '.join(strange)}, which is not known to be harmless, so it "
                f"was not read. Write the array anew with one of {', '.join(_CODECS)}"
            )

    def _require_sane(self) -> None:
        _ = self.attributes
        if min(self.block_shape, default=1) < 1 or min(self.array.shape, default=1) < 0:
            raise ValueError(f"chunks of shape {self.block_shape} for shape {self.array.shape}")
        size = math.prod(self.array.chunks) * self.dtype.itemsize
        if size > _MOST_DECODED:
            raise InvalidInput(
                f"{self.place} has chunks of shape {self.array.chunks}, {size:,} bytes each, which are decoded whole. "
                f"Up to {_MOST_DECODED:,} bytes are; write the array anew with smaller chunks"
            )


class _Objects(Store):
    """Metadata that was read and objects that were listed, as a store that Zarr reads."""

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, documents: Mapping[str, bytes], files: Mapping[str, File]) -> None:
        super().__init__(read_only=True)
        self._documents, self._files = documents, files

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return a document, or bytes of an object."""
        if key in self._documents:
            return prototype.buffer.from_bytes(self._documents[key])
        if (file := self._files.get(key)) is None:
            return None
        data = await asyncio.to_thread(file.read, *_limits(byte_range, file.size))
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return bytes of several objects."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether a document or an object is there."""
        return key in self._documents or key in self._files

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: it is only read."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Refuse: it is only read."""
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        """Refuse: names are known."""
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Refuse: names are known."""
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Refuse: names are known."""
        raise NotImplementedError


def _limits(part: ByteRequest | None, size: int) -> tuple[int, int]:
    if isinstance(part, RangeByteRequest):
        return part.start, min(part.end, size)
    if isinstance(part, SuffixByteRequest):
        return max(0, size - part.suffix), size
    return part.offset if isinstance(part, OffsetByteRequest) else 0, size


def _names(codecs: Any) -> Iterator[str]:
    """Yield the names of codecs in either format, those inside of others, too."""
    for codec in filter(None, codecs):
        if isinstance(codec, str):
            yield codec
            continue
        yield str(codec["name"] if "name" in codec else codec["id"])
        within = codec.get("configuration") or {}
        yield from _names([*within.get("codecs", []), *within.get("index_codecs", [])])


def _read(place: Location) -> bytes | None:
    try:
        return place.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
