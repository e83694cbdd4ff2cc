"""Any block survives the way into a shard and back; any damage is noticed."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from cvae_dist.store import STRING, ArrayLayout, Layout

DTYPES = st.sampled_from(["<f2", "<f4", "<f8", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def shards(draw: st.DrawFn) -> tuple[Layout, np.ndarray]:
    chunk, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = draw(st.integers(1, chunk * chunks))
    if draw(st.booleans()):
        layout = Layout(chunk * chunks, chunk, (ArrayLayout("x", STRING, ("sample",)),))
        return layout, np.array(draw(st.lists(TEXT, min_size=rows, max_size=rows)), dtype=object)
    features, dtype = draw(st.integers(1, 5)), draw(DTYPES)
    layout = Layout(chunk * chunks, chunk, (ArrayLayout("x", dtype, ("sample", "feature"), (features,)),))
    elements = {"allow_nan": True} if dtype[1] == "f" else {}
    return layout, draw(hnp.arrays(dtype, (rows, features), elements=elements or None))


def through_zarr(layout: Layout, data: bytes, rows: int) -> np.ndarray:
    key = layout.array("x").key(0)
    metadata = layout.metadata("x", rows)
    store = MemoryStore({"x/zarr.json": cpu.Buffer.from_bytes(metadata), key: cpu.Buffer.from_bytes(data)})
    return np.asarray(zarr.open_array(store, path="x", mode="r")[:])


@settings(max_examples=150, deadline=None)
@given(shards())
def test_zarr_reads_what_was_encoded(case: tuple[Layout, np.ndarray]) -> None:
    layout, block = case
    data = b"".join(bytes(buffer) for buffer in layout.encode("x", block))
    found = through_zarr(layout, data, len(block))
    if layout.array("x").dtype == STRING:
        assert found.tolist() == block.tolist()
    else:
        assert found.tobytes() == block.tobytes()


@settings(max_examples=150, deadline=None)
@given(shards(), st.data())
def test_one_changed_bit_is_noticed(case: tuple[Layout, np.ndarray], data: st.DataObject) -> None:
    layout, block = case
    content = bytearray(b"".join(bytes(buffer) for buffer in layout.encode("x", block)))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"."):
        layout.split("x", bytes(content))
