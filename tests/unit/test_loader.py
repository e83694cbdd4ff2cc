import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cvae_dist.errors import Corrupt, InvalidInput
from cvae_dist.store import Location
from cvae_dist.store.layout import ArrayLayout, Layout
from cvae_dist.store.permutation import pick_rows
from cvae_dist.store.ranges import RowNumbers
from cvae_dist.store.reader import ArrayRows, Reader, RowReader, ShardedArray
from cvae_dist.training.loader import Batch, Loader, read_rows
from cvae_dist.training.plan import plan_sampler
from cvae_dist.training.sampler import NO_ROWS, Sampler, Share
from tests.order import indices
from tests.unit.test_reader import write_shards

Array = npt.NDArray[Any]

ROWS, HELD_OUT, BATCH = 1003, 100, 64
RESIDENT, WINDOWED = 1_000_000, 16_000


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    if loader_threads():
        gc.collect()
    assert not loader_threads()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def values(dtype: str = "<f4", width: int = 5) -> Array:
    return np.random.default_rng(1).integers(0, 200, (ROWS, width)).astype(dtype)


def write(folder: Path, rows: Array, compressed: bool = False) -> RowReader:
    return RowReader(write_shards(str(folder / "x"), rows, compressed))


def plan(reader: Reader, buffer_bytes: int, held_out: int = HELD_OUT, batch_size: int = BATCH) -> Sampler:
    row_bytes = reader.dtype.itemsize * reader.n_features
    kept = reader.n_rows - held_out
    if buffer_bytes == WINDOWED:
        return Sampler(kept, batch_size, 5, max(6, reader.block_rows_hint), window_rows=150)
    return plan_sampler(kept, batch_size, row_bytes, 5, buffer_bytes, reader.block_rows_hint, held_out)


def check(loader: Loader, share: Share, rows: Array, steps: int, **start: int) -> None:
    """Compare every batch with the rows that the sampler's definition names."""
    sampler, excluded, part = share.sampler, share.excluded, {"rank": share.rank, "world": share.world}
    epoch, step = start.get("epoch", 0), start.get("first_step", 0)
    for batch, _ in zip(loader.batches(**start), range(steps), strict=False):
        assert (batch.epoch, batch.step) == (epoch, step)
        first, end = sampler.step(step)
        assert batch.n_global == end - first
        assert np.array_equal(batch.positions, sampler.positions(step, **part))
        x = batch.x.numpy()
        assert x.dtype == rows.dtype
        assert np.array_equal(x, rows[indices(sampler, epoch, step, excluded=excluded, **part)])
        epoch, step = divmod(epoch * sampler.steps_per_epoch + step + 1, sampler.steps_per_epoch)


@pytest.mark.parametrize("buffer_bytes", [RESIDENT, WINDOWED])
@pytest.mark.parametrize(("dtype", "width", "compressed"), [("<f4", 5, False), ("<f2", 10, False), ("|u1", 40, True)])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
def test_batches_are_those_of_the_order(
    tmp_path: Path, dtype: str, width: int, compressed: bool, buffer_bytes: int, rank: int, world: int
) -> None:
    rows = values(dtype, width)
    reader = write(tmp_path, rows, compressed)
    excluded = pick_rows(ROWS, HELD_OUT, 3)
    sampler = plan(reader, buffer_bytes)
    share = Share(sampler, excluded, rank, world)
    with Loader(reader, share, buffer_bytes=buffer_bytes) as loader:
        assert loader.resident == (buffer_bytes == RESIDENT)
        assert (sampler.windows > 1) == (buffer_bytes == WINDOWED)
        check(loader, share, rows, 35)
        check(loader, share, rows, 20, epoch=2, first_step=7)
        check(loader, share, rows, 3, epoch=1, first_step=sampler.steps_per_epoch - 1)


@pytest.mark.parametrize("batch_size", [1, 5, 50, 903, 2000])
def test_any_batch_size_works_with_any_world(tmp_path: Path, batch_size: int) -> None:
    rows = values()
    reader = write(tmp_path, rows)
    excluded = pick_rows(ROWS, HELD_OUT, 3)
    sampler = Sampler(ROWS - HELD_OUT, batch_size, 2, block_rows=6, window_rows=140, lanes=8)
    for rank in range(7):
        share = Share(sampler, excluded, rank, world=7)
        with Loader(reader, share, buffer_bytes=100) as loader:
            assert not loader.resident
            check(loader, share, rows, 2 * min(20, sampler.steps_per_epoch))


def test_arrays_in_memory_are_not_copied() -> None:
    rows = values()
    reader = ArrayRows(rows)
    share = Share(plan(reader, WINDOWED, held_out=0), NO_ROWS)
    with Loader(reader, share, buffer_bytes=WINDOWED) as loader:
        assert loader.resident
        batches = [batch.x.numpy() for batch, _ in zip(loader.batches(), range(3), strict=False)]
        assert not any(np.shares_memory(x, rows) for x in batches)
        check(loader, share, rows, 40)


def test_a_store_that_fits_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = values()
    reader = write(tmp_path, rows)
    calls = []
    read_into = reader.read_into

    def counted(out: Array, starts: RowNumbers, counts: RowNumbers, verify: bool = False) -> None:
        calls.append(len(out))
        read_into(out, starts, counts, verify)

    monkeypatch.setattr(reader, "read_into", counted)
    share = Share(plan(reader, RESIDENT, held_out=0), NO_ROWS)
    with Loader(reader, share, buffer_bytes=RESIDENT) as loader:
        check(loader, share, rows, 50)
        check(loader, share, rows, 50, epoch=7)
    assert calls == [ROWS]


def test_the_memory_is_that_which_is_given(tmp_path: Path) -> None:
    reader = write(tmp_path, values("|u1", 40), compressed=True)
    share = Share(plan(reader, WINDOWED, held_out=0), NO_ROWS)
    for given, request in ((WINDOWED, 112), (8000, 45)):
        with Loader(reader, share, buffer_bytes=given) as loader:
            assert loader.buffer_bytes <= given
            assert f"1003 rows in requests of {request}, " in repr(loader)
            check(loader, share, values("|u1", 40), 20)


def test_a_batch_is_not_changed_by_those_after_it(tmp_path: Path) -> None:
    reader = write(tmp_path, values())
    share = Share(plan(reader, WINDOWED, held_out=0), NO_ROWS)
    with Loader(reader, share, buffer_bytes=WINDOWED) as loader:
        batches = [batch.x for batch, _ in zip(loader.batches(), range(15), strict=False)]
        again = [batch.x.clone() for batch, _ in zip(loader.batches(), range(15), strict=False)]
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one, other)


def read_on(batches: list[Iterator[Batch]], steps: int) -> None:
    for _ in range(steps):
        for one in batches:
            next(one)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_bit_is_found_within_an_epoch_of_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool, world: int
) -> None:
    monkeypatch.setattr("cvae_dist.store.reader._DECODED_BYTES", 0)  # chunks of which a part was read are kept
    rows = values("|u1", 40)
    reader = write(tmp_path, rows, compressed)
    share = plan(reader, WINDOWED, held_out=0)
    path = tmp_path / "x/c.9.0"
    loaders = [Loader(reader, Share(share, NO_ROWS, rank, world), buffer_bytes=WINDOWED) for rank in range(world)]
    batches = [loader.batches() for loader in loaders]
    try:
        for one in batches:
            next(one)
        data = bytearray(path.read_bytes())
        data[800] ^= 4
        with path.open("r+b") as file:
            file.write(data)
        with pytest.raises(Corrupt, match=r"x/c.9.0: chunk 1 .* `cvae-dist verify STORE` names"):
            read_on(batches, 2 * world * share.steps_per_epoch + 5)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["mapped", "mapped, beyond the memory", "compressed"])
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_shard_that_is_lost_under_a_running_training_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, kind: str
) -> None:
    if kind == "mapped, beyond the memory":
        monkeypatch.setattr("cvae_dist.store.mapped.free_memory", lambda: 0)
    monkeypatch.setattr("cvae_dist.store.reader._DECODED_BYTES", 0)
    compressed = kind == "compressed"
    reader = write(tmp_path, values("|u1", 20) if compressed else values(), compressed)
    sampler = plan(reader, WINDOWED, held_out=0)
    with Loader(reader, Share(sampler, NO_ROWS), buffer_bytes=WINDOWED) as loader:
        batches = loader.batches()
        next(batches)
        if damage == "gone":
            (tmp_path / "x/c.5.0").unlink()
        else:
            os.truncate(tmp_path / "x/c.5.0", 1000 if kind != "compressed" else 0)
        with pytest.raises(Corrupt, match="x/c.5.0"):
            read_on([batches], 3 * sampler.steps_per_epoch)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_epoch_reads_each_byte_of_an_object_store_hardly_more_than_once(
    monkeypatch: pytest.MonkeyPatch, compressed: bool, world: int
) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (100_000, 64), np.uint8)
    layout = Layout(10_000, 100, (ArrayLayout("x", "|u1", ("sample", "feature"), (64,), raw=not compressed),))
    place = Location.of(f"memory://epoch-{compressed}-{world}")
    array = ShardedArray(place, "|u1", (64,), len(rows), 10_000, 100, compressed)
    for shard, block in enumerate(np.split(rows, 10)):
        array.shard(shard).write(*layout.encode("x", block))
    came = []
    fill_many = Location.fill_many

    def counted(wanted: Any) -> Any:
        found = fill_many(wanted)
        came.extend(size for size, _ in found)
        return found

    monkeypatch.setattr(Location, "fill_many", staticmethod(counted))
    stored = sum(entry.size for entry in place.list())
    for rank in range(world):
        reader = RowReader(array)
        sampler = plan(reader, 2_000_000, batch_size=32)
        assert sampler.variance_inflation <= 1.1
        share = Share(sampler, pick_rows(len(rows), HELD_OUT, 0), rank, world)
        with Loader(reader, share, buffer_bytes=2_000_000) as loader:
            assert not loader.resident
            read_on([loader.batches()], sampler.steps_per_epoch)
    assert stored <= 1.05 * sum(came)
    assert sum(came) <= 1.2 * stored


class Failing(ArrayRows):
    """Rows behind a connection that breaks."""

    def __init__(self, array: Array, error: BaseException, after: int) -> None:
        super().__init__(array)
        self.error, self.left = error, after

    def read_into(self, out: Array, starts: RowNumbers, counts: RowNumbers, verify: bool = False) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        super().read_into(out, starts, counts, verify)


def streaming(reader: ArrayRows, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Open a loader that treats an array in memory like storage."""
    monkeypatch.setattr("cvae_dist.training.loader.ArrayRows", type(None))
    return Loader(reader, Share(plan(reader, WINDOWED, held_out=0), NO_ROWS), buffer_bytes=WINDOWED)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("error", [OSError("the cable is cut"), MemoryError("no room"), SystemExit(3)])
def test_errors_of_the_thread_are_raised_in_the_consumer(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    loader = streaming(Failing(values(), error, after=2), monkeypatch)
    seen: list[int] = []
    with pytest.raises(type(error)) as caught:
        seen.extend(len(batch.x) for batch in loader.batches())
    assert caught.value is error
    assert sum(seen) > 0
    assert not loader_threads()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("buffer_bytes", [RESIDENT, WINDOWED])
def test_a_corrupt_shard_is_named(tmp_path: Path, buffer_bytes: int) -> None:
    reader = write(tmp_path, values())
    (tmp_path / "x/c.5.0").unlink()
    with (
        Loader(reader, Share(plan(reader, buffer_bytes, 0), NO_ROWS), buffer_bytes=buffer_bytes) as loader,
        pytest.raises(Corrupt, match="x/c.5.0"),
    ):
        for _ in loader.batches():
            pass


@pytest.mark.timeout(20)
def test_close_ends_thread_and_iterator(tmp_path: Path) -> None:
    reader = write(tmp_path, values())
    loader = Loader(reader, Share(plan(reader, WINDOWED, 0), NO_ROWS), buffer_bytes=WINDOWED)
    batches = loader.batches()
    assert not loader_threads()
    next(batches)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.timeout(20)
def test_a_dropped_iterator_leaves_no_thread(tmp_path: Path) -> None:
    reader = write(tmp_path, values())
    loader = Loader(reader, Share(plan(reader, WINDOWED, 0), NO_ROWS), buffer_bytes=WINDOWED)
    batches = loader.batches()
    next(batches)
    del batches
    gc.collect()
    assert not loader_threads()
    next(loader.batches(1, 2))
    del loader
    gc.collect()
    assert not loader_threads()


@pytest.mark.timeout(20)
def test_a_new_iterator_ends_the_one_before(tmp_path: Path) -> None:
    reader = write(tmp_path, values())
    with Loader(reader, Share(plan(reader, WINDOWED, 0), NO_ROWS), buffer_bytes=WINDOWED) as loader:
        old, new = loader.batches(), loader.batches()
        next(old)
        threads = loader_threads()
        next(new)
        assert not set(threads) & set(loader_threads())
        with pytest.raises(StopIteration):
            next(old)


@pytest.mark.timeout(20)
def test_the_next_epoch_is_read_while_this_one_is_consumed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Failing(values(), OSError(), after=10**6)
    with streaming(reader, monkeypatch) as loader:
        batches = loader.batches(0, plan(reader, WINDOWED, held_out=0).steps_per_epoch - 1)
        next(batches)
        deadline = time.monotonic() + 10
        while 10**6 - reader.left < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 10**6 - reader.left == 3  # the last window, and two of the next epoch


@pytest.mark.timeout(20)
def test_a_thread_that_vanishes_does_not_hang_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae_dist.training.loader._ALIVE_SECONDS", 0.05)
    monkeypatch.setattr("cvae_dist.training.loader._Ahead._run", lambda self: None)
    with (
        Loader(
            ArrayRows(values()), Share(Sampler(ROWS, 10, 0, 1, 200, lanes=4), NO_ROWS), buffer_bytes=RESIDENT
        ) as loader,
        pytest.raises(RuntimeError, match="ended without a word"),
    ):
        next(loader.batches())


def test_orders_for_other_rows_are_refused() -> None:
    reader, sampler = ArrayRows(values()), Sampler(900, 10, 0, 1, 200, lanes=4)
    with pytest.raises(InvalidInput, match="the order is made for 900 rows, but there are 1003 rows"):
        Loader(reader, Share(sampler, NO_ROWS), buffer_bytes=RESIDENT)
    for wrong in (np.arange(103)[::-1], np.zeros(103, int), np.arange(901, 1004), np.arange(-1, 102)):
        with pytest.raises(InvalidInput, match="103 excluded rows must be ascending"):
            Share(sampler, excluded=wrong)
    with pytest.raises(InvalidInput, match="5 ranks share 4 lanes"):
        Share(sampler, excluded=np.arange(103), rank=0, world=5)
    with pytest.raises(InvalidInput, match="step 90 of an epoch of 90"):
        Loader(reader, Share(sampler, np.arange(103)), buffer_bytes=RESIDENT).batches(0, 90)


def test_single_rows_are_read_together(tmp_path: Path) -> None:
    rows = values()
    reader = write(tmp_path, rows)
    for chosen in ([], [0], [3, 4, 5, 900, 1002], [9, 8, 8]):
        index = np.array(chosen, dtype=np.int64)
        assert np.array_equal(read_rows(reader, index), rows[index])
