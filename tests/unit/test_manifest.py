"""The manifest of a store: written and read as a stream, named by its content, and refused where it was forged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cvae_dist.errors import Corrupt, InvalidInput
from cvae_dist.store import ArrayLayout, Entries, Layout, Location, Moments, Records, RowStore
from cvae_dist.store import manifest as manifests
from cvae_dist.store.ledger import Digest
from cvae_dist.store.manifest import Batches, as_spans, digest_of, read_spans
from cvae_dist.verbs.verify import verify

LAYOUT = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (2,)),))
ROWS = np.arange(20, dtype=np.float32).reshape(10, 2)


def entries(count: int = 11, dropped: str = "3,17-20") -> Entries:
    """Ten files of a row each, in an order of their own, the first of which left rows out, and one set aside."""
    status = np.full(count, "", object)
    status[-1] = "truncated"
    details = np.where(status == "", "", "ends at byte 3")
    lost = np.full(count, "", object)
    lost[0] = dropped
    rows = (status == "").astype(np.int64)
    starts = np.arange(count)[::-1] - 1
    starts[-1] = 0
    return Entries(
        np.array([f"ü/{n:03d}" for n in range(count)], object), np.arange(count) * 7,
        np.array([f"v{n}" for n in range(count)], object), starts, rows, lost, status, details.astype(object),
    )  # fmt: skip


def publish(place: Path, manifest: Batches | None, dropped: int = 5) -> RowStore:
    location = Location.of(place)
    store = RowStore.create(location, "rows", LAYOUT, {})
    digests = []
    for shard in range(3):
        buffers = LAYOUT.encode("x", ROWS[4 * shard : 4 * shard + 4])
        (location / f"x/c.{shard}.0").write(*buffers)
        digests.append(Digest.of_shard(buffers))
    counts = [4, 4, 2]
    records = Records.joined(Records.one(7, count, [digest]) for count, digest in zip(counts, digests, strict=True))
    store.publish(10, records, [Moments.of(ROWS.astype(float))], {}, "test", manifest, dropped)
    return RowStore.open(str(place))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowStore:
    monkeypatch.setattr(manifests, "_CHUNK_ROWS", 4)
    return publish(tmp_path / "store", lambda: [entries()[:5], entries()[5:]])


def test_what_was_written_is_read(store: RowStore) -> None:
    manifest = store.manifest()
    assert manifest is not None
    assert len(manifest) == 11
    batches = list(manifest.batches())
    assert [len(batch) for batch in batches] == [4, 4, 3]
    for name, values in Entries.join(batches).columns().items():
        assert values.tolist() == getattr(entries(), name).tolist()
        assert values.dtype == getattr(entries(), name).dtype
    assert verify(store.url).ok


def test_zarr_and_xarray_read_it(store: RowStore) -> None:
    group = zarr.open_group(store.url, mode="r")[store.publication.path]
    for name, values in entries().columns().items():
        assert group[f"manifest_{name}"][...].tolist() == values.tolist()
    with xr.open_zarr(f"{store.url}/{store.publication.path}", consolidated=False) as dataset:
        assert dataset["manifest_path"].dims == ("file",)
        assert dataset["manifest_path"].values.tolist() == entries().path.tolist()
        assert int(dataset["manifest_rows"].sum()) == 10


def test_a_store_that_was_made_of_no_files_has_none(tmp_path: Path) -> None:
    store = publish(tmp_path / "store", None)
    assert store.manifest() is None
    assert verify(store.url).ok
    empty = publish(tmp_path / "empty", lambda: []).manifest()
    assert empty is not None
    assert (len(empty), list(empty.batches())) == (0, [])
    assert [problem.array for problem in verify(str(tmp_path / "empty")).problems] == ["manifest"] * 2


def test_the_publication_is_named_after_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_CHUNK_ROWS", 4)
    one = digest_of([entries()])
    assert digest_of([entries()[:1], entries()[1:6], entries()[6:]]) == one
    other = [replace(entries(), **{name: values[::-1]}) for name, values in entries().columns().items()]
    assert len({one, digest_of([]), digest_of([entries()[:10]]), *(digest_of([change]) for change in other)}) == 11
    parts = {"whole": [entries()], "cut": [entries()[:2], entries()[2:]], "other": other[:1]}
    whole, cut, changed = (publish(tmp_path / name, lambda part=part: part) for name, part in parts.items())
    assert whole.publication.path == cut.publication.path != changed.publication.path


def test_verify_compares_rows_and_what_was_left_out(tmp_path: Path) -> None:
    store = publish(tmp_path / "rows", lambda: [entries()[:9]])
    assert [str(problem) for problem in verify(store.url).problems] == [
        "manifest: its files do not make the 10 rows of the store"
    ]
    store = publish(tmp_path / "dropped", lambda: [entries(dropped="1-2")])
    assert [str(problem) for problem in verify(store.url).problems] == ["manifest: it leaves out 2 rows, the store 5"]
    store = publish(tmp_path / "text", lambda: [entries(dropped="1-a")])
    assert [problem.array for problem in verify(store.url).problems] == ["manifest"]


FORGED = {
    "its paths are not sorted": {"path": entries().path[::-1]},
    "negative numbers": {"size": -entries().size},
    "rows that the store has not": {"start": entries().start + 2**62},
    "it has rows": {"rows": np.ones(11, np.int64)},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_refused(tmp_path: Path, what: str) -> None:
    store = publish(tmp_path / "store", lambda: [replace(entries(), **FORGED[what])])
    manifest = store.manifest()
    assert manifest is not None
    with pytest.raises(Corrupt, match=f"damaged or forged: .*{what}"):
        list(manifest.batches())
    assert "manifest" in [problem.array for problem in verify(store.url).problems]


def test_paths_are_sorted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_CHUNK_ROWS", 4)
    rows = entries()
    store = publish(tmp_path / "store", lambda: [rows[np.array([0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10])]])
    with pytest.raises(Corrupt, match="not sorted"):
        list((store.manifest() or pytest.fail("it has none")).batches())


@pytest.mark.parametrize("change", [{"shape": [11, 1]}, {"shape": [12]}, {"chunk": 3}, {"dtype": "<f8"}])
def test_a_forged_description_is_refused(store: RowStore, change: dict[str, object]) -> None:
    file = Path(store.url) / "zarr.json"
    group = json.loads(file.read_text())
    group["attributes"]["cvae_dist"]["arrays"]["manifest_size"] |= change
    file.write_text(json.dumps(group))
    with pytest.raises(InvalidInput, match="damaged or forged"):
        RowStore.open(store.url)


@given(st.sets(st.integers(0, 60)))
def test_spans_of_row_numbers(numbers: set[int]) -> None:
    text = as_spans(np.array(sorted(numbers), np.int64))
    spans = read_spans(text)
    assert [number for first, stop in spans for number in range(first, stop)] == sorted(numbers)
    assert text.count(",") + 1 == max(1, len(spans))


def test_spans_that_nobody_wrote() -> None:
    assert as_spans(np.array([3, 17, 18, 19, 20])) == "3,17-20"
    assert read_spans("3,17-20").tolist() == [[3, 4], [17, 21]]
    for text in ("a", "1,", "-1", "1-", "3-2", "5,4", "1,1", "1-3,4", "1-3,3", "9" * 19, "1 - 2", "１"):
        with pytest.raises(ValueError, match="row numbers"):
            read_spans(text)
