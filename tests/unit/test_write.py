"""The write protocol with a made-up verb."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.cluster import Job, Made, Output, Plan, Span, reused_block
from cvae_dist.errors import Corrupt, InvalidInput, OutputLocked, SettingsChanged, StorageFailed
from cvae_dist.events import Event, ignore
from cvae_dist.store import STRING, ArrayLayout, Layout, Location, Moments, RowStore
from cvae_dist.verbs.verify import verify

LAYOUT = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (2,)),))


@dataclass(frozen=True)
class CountRows:
    """The task of a shard: rows counted from 0."""

    make: "Make"
    span: Span

    def __call__(self) -> Made:
        self.make.made.append(self.span.shard)
        return Made({"x": np.repeat(np.arange(self.span.start, self.span.stop, dtype=np.float32), 2).reshape(-1, 2)})


class Make:
    """Makes tasks; remembers the shards that were asked for, identified and made."""

    def __init__(self, made_from: Callable[[Span], bytes] = lambda span: b"") -> None:
        self.made_from = made_from
        self.asked: list[int] = []
        self.identified: list[int] = []
        self.made: list[int] = []

    def __call__(self, span: Span) -> CountRows:
        self.asked.append(span.shard)
        return CountRows(self, span)

    def identity(self, span: Span) -> bytes:
        self.identified.append(span.shard)
        return self.made_from(span)


def job(rows: int, make: Make, **changes: Any) -> Job:
    return replace(Job("rows", LAYOUT, rows, {"a": 1}, make, make.identity), **changes)


def write(path: Path, work: Job, overwrite: bool = False, client: Any = None, on_event: Any = ignore) -> Any:
    with Output.held(Location.of(path), "test", overwrite=overwrite, client=client, on_event=on_event) as output:
        return output.write(work)


def objects(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def stop_at(done: int) -> Callable[[Event], None]:
    """Return a listener that interrupts a run once so many rows are done."""

    def stop(event: Event) -> None:
        if event.kind == "progress" and event.done == done:
            raise KeyboardInterrupt

    return stop


def interrupted(path: Path, work: Job, done: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(path, work, on_event=stop_at(done))


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards a pack."""
    monkeypatch.setattr(Layout, "shards_per_pack", 2)


def test_task_and_identity_of_a_shard_are_asked_for_once_a_run(tmp_path: Path) -> None:
    fresh = Make()
    write(tmp_path / "s", job(10, fresh))
    assert sorted(fresh.asked) == sorted(fresh.identified) == sorted(fresh.made) == [0, 1, 2]
    done = Make()
    write(tmp_path / "s", job(10, done))
    assert (done.asked, done.identified, done.made) == ([], [0, 1, 2], [])
    grown = Make()
    write(tmp_path / "s", job(14, grown, first_shard=2))
    assert (grown.asked, grown.identified, grown.made) == ([2, 3], [2, 3], [2, 3])


def test_written_once_and_grown(tmp_path: Path) -> None:
    make = Make()
    result = write(tmp_path / "s", job(10, make))
    assert (result.rows, result.rows_written, make.made) == (10, 10, [0, 1, 2])
    assert write(tmp_path / "s", job(10, make)).nothing_to_do
    result = write(tmp_path / "s", job(17, make))
    assert (result.rows, result.rows_written, make.made) == (17, 9, [0, 1, 2, 2, 3, 4])
    store = RowStore.open(str(tmp_path / "s"))
    assert store.read("x")[:, 0].tolist() == list(range(17))
    assert len(store.history.splitlines()) == 2
    assert verify(str(tmp_path / "s")).ok


def test_events(tmp_path: Path) -> None:
    events: list[Event] = []
    write(tmp_path / "s", job(10, Make()), on_event=events.append)
    assert [(e.kind, e.done, e.total) for e in events] == [
        ("start", 0, 10), ("progress", 4, 10), ("progress", 8, 10), ("progress", 10, 10), ("done", 10, 10)
    ]  # fmt: skip
    assert events[-1].message == ""
    events.clear()
    write(tmp_path / "s", job(10, Make()), on_event=events.append)
    assert [(e.kind, e.done) for e in events] == [("start", 10), ("done", 10)]
    assert "nothing to do" in events[-1].message


def test_published_rows_are_never_taken_away_or_changed(tmp_path: Path) -> None:
    write(tmp_path / "s", job(10, Make()))
    before = (tmp_path / "s" / "zarr.json").read_bytes()
    with pytest.raises(SettingsChanged, match="holds 10 rows, but is now to have 6"):
        write(tmp_path / "s", job(6, Make()))
    for rows in (10, 17):
        with pytest.raises(SettingsChanged, match="rows 0 to 4 of .* are published, but what they are made from"):
            write(tmp_path / "s", job(rows, Make(lambda span: b"other")))
    changed_tail = job(10, Make(lambda span: b"other" if span.shard == 2 else b""))
    with pytest.raises(SettingsChanged, match="rows 8 to 10"):
        write(tmp_path / "s", changed_tail)
    assert (tmp_path / "s" / "zarr.json").read_bytes() == before


def test_other_arrays_or_grid(tmp_path: Path) -> None:
    write(tmp_path / "s", job(10, Make()))
    wider = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (3,)),))
    for layout in (wider, Layout(8, 2, LAYOUT.arrays)):
        with pytest.raises(SettingsChanged, match=r"has x .* in shards of 4 rows, but x .* are asked for"):
            write(tmp_path / "s", job(10, Make(), layout=layout))
        assert write(tmp_path / "t", job(10, Make()), overwrite=True).rows == 10


def test_overwrite_is_refused_before_anything_is_deleted(tmp_path: Path) -> None:
    write(tmp_path / "s", job(10, Make()))

    with Output.held(Location.of(tmp_path / "s"), "test", overwrite=True, client=None, on_event=ignore) as output:
        assert output.existing is None, "what is overwritten must not be looked at"
    with pytest.raises(InvalidInput, match="may use 100 MB"):
        write(tmp_path / "s", job(10, Make(), settings={"a": 2}), overwrite=True, client=SmallCluster())
    assert RowStore.open(str(tmp_path / "s")).rows == 10


class SmallCluster:
    """A cluster whose only worker has 100 MB."""

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {"tcp://w:1": {"memory_limit": 100_000_000, "nthreads": 3}}}

    def nthreads(self) -> dict[str, int]:
        return {"tcp://w:1": 3}


def test_too_small_worker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make = Make()
    with pytest.raises(InvalidInput, match=r"worker tcp://w:1 may use 100 MB, but its 3 threads need 330 MB \(10 MB"):
        write(tmp_path / "s", job(10, make, task_bytes=10_000_000), client=SmallCluster())
    assert make.asked == make.identified == [], "memory is refused before anything is digested"
    assert list(tmp_path.iterdir()) == []


class TooFewRows(Make):
    def __call__(self, span: Span) -> Any:
        return lambda: Made({"x": np.zeros((1, 2), np.float32)})


def test_not_the_whole_shard(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not the whole shard"):
        write(tmp_path / "s", job(10, TooFewRows()))


# ------------------------------------------------------------------------------------- journal and publication


@pytest.mark.usefixtures("small_packs")
def test_recorded_packs_are_not_made_again(tmp_path: Path) -> None:
    make = Make()
    interrupted(tmp_path / "s", job(30, make), 20)
    assert sorted(path.name for path in (tmp_path / "s/journal").iterdir()) == ["0", "1"]
    assert make.made == [0, 1, 2, 3, 4]
    make.made.clear()
    assert write(tmp_path / "s", job(30, make)).rows_written == 14
    assert make.made == [4, 5, 6, 7], "only what is in no recorded pack is repeated"
    write(tmp_path / "whole", job(30, Make()))
    assert {**objects(tmp_path / "s"), "zarr.json": b""} == {**objects(tmp_path / "whole"), "zarr.json": b""}


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("changed", ["rows", "what shard 0 is made from"])
def test_a_journal_of_something_else_is_not_used(tmp_path: Path, changed: str) -> None:
    interrupted(tmp_path / "s", job(13 if changed == "rows" else 20, Make()), 13 if changed == "rows" else 16)
    make = Make((lambda span: b"") if changed == "rows" else lambda span: b"other" * (span.shard == 0))
    write(tmp_path / "s", job(20, make))
    assert make.made == ([2, 3, 4] if changed == "rows" else [0, 1, 4])
    assert verify(str(tmp_path / "s")).ok


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("how", ["other", "damaged", "lost"])
def test_a_pack_that_vanished_or_changed_during_the_run_is_not_published(tmp_path: Path, how: str) -> None:
    make = Make()
    pack = tmp_path / "s/journal/0"

    def meddle(event: Event) -> None:
        if event.done == 14 and event.kind == "progress":
            if how == "lost":
                pack.unlink()
            else:
                pack.write_bytes((tmp_path / "s/journal/1").read_bytes() if how == "other" else b"")

    with pytest.raises(StorageFailed, match="pack 0 of .* was changed by another writer"):
        write(tmp_path / "s", job(14, make), on_event=meddle)
    assert write(tmp_path / "s", job(14, make)).rows == 14
    assert make.made == [0, 1, 2, 3, 0, 1]
    assert verify(str(tmp_path / "s")).ok


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("how", ["written again", "other", "lost"])
def test_a_shard_that_vanished_or_changed_during_the_run_is_not_published(tmp_path: Path, how: str) -> None:
    make = Make()
    shard = tmp_path / "s/x/c.1.0"

    def meddle(event: Event) -> None:
        if event.done == 14 and event.kind == "progress":
            data = shard.read_bytes()
            shard.unlink()
            if how != "lost":
                (shard.parent / "new").write_bytes(data if how == "written again" else b"x")
                (shard.parent / "new").rename(shard)

    with pytest.raises(StorageFailed, match="shard 1 of .*/x is not as this run wrote it"):
        write(tmp_path / "s", job(14, make), on_event=meddle)
    found = RowStore.find(str(tmp_path / "s"))
    assert found is not None
    assert not found.published
    assert write(tmp_path / "s", job(14, make)).rows == 14
    assert make.made == [0, 1, 2, 3, 0, 1]
    assert verify(str(tmp_path / "s")).ok


@pytest.mark.usefixtures("small_packs")
def test_a_lost_shard_of_a_recorded_pack_is_made_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "s", job(30, Make()), 16)
    (tmp_path / "s/x/c.1.0").unlink()
    with pytest.raises(StorageFailed, match="shard 1 of .* run the same command again"):
        write(tmp_path / "s", job(30, Make()))
    make = Make()
    write(tmp_path / "s", job(30, make))
    assert make.made == [0, 1]
    assert verify(str(tmp_path / "s")).ok


def test_another_driver_that_took_the_store_over_is_not_overwritten(tmp_path: Path) -> None:
    def take_over(event: Event) -> None:
        if event.done == 10 and event.kind == "progress":
            found = RowStore.find(str(tmp_path / "s"))
            assert found is not None
            found.claimed("another")

    with pytest.raises(OutputLocked, match="was changed by another driver"):
        write(tmp_path / "s", job(10, Make()), on_event=take_over)
    found = RowStore.find(str(tmp_path / "s"))
    assert found is not None
    assert (found.published, found.document["driver"]) == (False, "another")


def test_sources_are_confirmed_before_anything_is_published(tmp_path: Path) -> None:
    def replaced() -> None:
        raise Corrupt("the rows were replaced")

    with pytest.raises(Corrupt, match="were replaced"):
        write(tmp_path / "s", job(10, Make(), confirm=replaced))
    found = RowStore.find(str(tmp_path / "s"))
    assert found is not None
    assert not found.published


def test_lost_ledger_of_a_published_store(tmp_path: Path) -> None:
    write(tmp_path / "s", job(10, Make()))
    before = objects(tmp_path / "s")
    (ledger,) = (name for name in before if "/record/c." in name)
    (tmp_path / "s" / ledger).unlink()
    for rows, first_shard in ((10, 0), (17, 0), (17, 2)):
        with pytest.raises(Corrupt, match="record/c.0.0 is missing"):
            write(tmp_path / "s", job(rows, Make(), first_shard=first_shard))
    before.pop(ledger)
    assert objects(tmp_path / "s") == before


def test_the_publication_and_the_one_before_are_kept(tmp_path: Path) -> None:
    seen = []
    for rows in (3, 10, 17, 20):
        write(tmp_path / "s", job(rows, Make()))
        seen.append(RowStore.open(str(tmp_path / "s")).publication.path.rpartition("/")[2])
        kept = {path.name for path in (tmp_path / "s/publications").iterdir()} - {"zarr.json"}
        assert kept == set(seen[-2:])
        assert not list((tmp_path / "s").glob("journal/*"))
    assert len(set(seen)) == 4


# ---------------------------------------------------------------------------------------------- moments


class Normal(Make):
    """Rows whose sums depend on their order."""

    def __call__(self, span: Span) -> Any:
        rows = np.random.default_rng(0).normal(1e3, size=(200, 2)).astype(np.float32)[span.start : span.stop]
        return lambda: Made({"x": rows})


def require_moments(found: Moments, rows: np.ndarray) -> None:
    expected = Moments.of(rows)
    assert found.count == expected.count
    for name in ("mean", "m2", "minimum", "maximum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)


@pytest.mark.parametrize("shards", [1, 2, 100])
def test_moments_of_a_store_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    monkeypatch.setattr(Layout, "shards_per_pack", shards)
    for rows in (3, 5, 8, 24, 25):  # inside a shard, a pack, and at their ends
        write(tmp_path / "s", job(rows, Normal()))
        store = RowStore.open(str(tmp_path / "s"))
        packs = -(-store.layout.shards(rows) // shards)
        assert ("moments" in store.publication.arrays) == (packs > 1)
        require_moments(store.statistics(), store.read("x"))
        for number in range(packs):
            first = number * shards * 4
            require_moments(list(store.pack_moments())[number], store.read("x", first, min(rows, first + shards * 4)))
    assert verify(str(tmp_path / "s")).ok
    write(tmp_path / "whole", job(25, Normal()))
    whole = RowStore.open(str(tmp_path / "whole"))
    np.testing.assert_allclose(store.statistics().mean, whole.statistics().mean, rtol=1e-12)
    np.testing.assert_allclose(store.statistics().std, whole.statistics().std, rtol=1e-12)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_moments_of_wide_rows_do_not_depend_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """They are merged where the shards are made, a tile at a time, and regions of any size cut no tile."""
    monkeypatch.setattr("cvae_dist.store.layout._LARGE_MOMENTS", 0)
    monkeypatch.setattr("cvae_dist.store.layout._TILE_SHARDS", 3)
    monkeypatch.setattr(Layout, "shards_per_pack", 12)
    write(tmp_path / "one", job(200, Normal()))
    monkeypatch.setattr("cvae_dist.cluster.write.slots", lambda client: slots)
    write(tmp_path / "s", job(200, Normal(), threads=2))
    assert {**objects(tmp_path / "s"), "zarr.json": b""} == {**objects(tmp_path / "one"), "zarr.json": b""}


# -------------------------------------------------------------------------------------- published rows that change


def other(*shards: int) -> Make:
    """Rows of which some shards are made from something else."""
    return Make(lambda span: b"other" * (span.shard in shards))


@pytest.mark.usefixtures("small_packs")
def test_only_shards_that_are_made_from_something_else_are_made_again(tmp_path: Path) -> None:
    write(tmp_path / "s", job(30, Make()))
    make = other(1, 4)
    events: list[Event] = []
    result = write(tmp_path / "s", job(30, make, rewrites=True), on_event=events.append)
    assert (make.made, result.rows_written) == ([1, 4], 8)
    assert any("8 of 30 published rows are in 2 shards that are made again" in event.message for event in events)
    assert verify(str(tmp_path / "s")).ok
    assert write(tmp_path / "s", job(30, other(1, 4), rewrites=True)).nothing_to_do
    require_moments(RowStore.open(str(tmp_path / "s")).statistics(), RowStore.open(str(tmp_path / "s")).read("x"))


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize(
    ("rows", "keeps_tail", "made"),
    [
        (21, True, [1, 4, 5]),  # the last shard, which grows, lies in another pack than the one that changed
        (21, False, [1, 4, 5]),
        (18, False, [1]),
        (17, True, [1, 4]),
        (16, True, [1]),
        (5, True, [1]),
    ],
)
def test_rows_come_and_go_while_others_change(tmp_path: Path, rows: int, keeps_tail: bool, made: list[int]) -> None:
    write(tmp_path / "s", job(18, Make()))
    make = other(1)
    write(tmp_path / "s", job(rows, make, rewrites=True, keeps_tail=keeps_tail))
    assert make.made == made
    store = RowStore.open(str(tmp_path / "s"))
    assert store.read("x")[:, 0].tolist() == list(range(rows))
    require_moments(store.statistics(), store.read("x"))
    assert verify(str(tmp_path / "s")).ok
    assert not list((tmp_path / "s/x").glob(f"c.{-(-rows // 4)}.*")), "a shard beyond the end"
    assert write(tmp_path / "s", job(rows, other(1), rewrites=True)).nothing_to_do


@pytest.mark.usefixtures("small_packs")
def test_staged_shards_of_a_recorded_pack_are_not_made_again(tmp_path: Path) -> None:
    write(tmp_path / "s", job(30, Make()))
    published = objects(tmp_path / "s")
    interrupted(tmp_path / "s", job(30, other(0, 1, 5), rewrites=True), 22)
    there = objects(tmp_path / "s")
    assert {name: there[name] for name in published if name != "zarr.json"} == {
        name: data for name, data in published.items() if name != "zarr.json"
    }
    make = other(0, 1, 5)
    write(tmp_path / "s", job(30, make, rewrites=True))
    assert make.made == [5]
    assert verify(str(tmp_path / "s")).ok


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("how", ["other", "lost"])
def test_a_staged_shard_that_vanished_or_changed_is_not_published(tmp_path: Path, how: str) -> None:
    write(tmp_path / "s", job(30, Make()))
    before = (tmp_path / "s/x/c.5.0").read_bytes()

    def meddle(event: Event) -> None:
        staged = tmp_path / "s/journal/shards/x/c.5.0"
        if event.kind == "progress" and staged.exists():
            staged.unlink() if how == "lost" else staged.write_bytes(b"x")

    with pytest.raises(StorageFailed, match="shard 5 of .*/x is not as this run wrote it"):
        write(tmp_path / "s", job(30, other(5), rewrites=True), on_event=meddle)
    assert (tmp_path / "s/x/c.5.0").read_bytes() == before
    assert write(tmp_path / "s", job(30, other(5), rewrites=True)).rows_written == 4
    assert verify(str(tmp_path / "s")).ok


def test_a_driver_that_was_followed_while_it_moved_shards_changes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", job(10, Make()))
    real = RowStore.delete_beyond

    def followed(self: RowStore, shards: int) -> None:
        found = RowStore.find(str(tmp_path / "s"))
        assert found is not None
        found.claimed("another")
        real(self, shards)

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "delete_beyond", followed)
        with pytest.raises(OutputLocked, match="was changed by another driver"):
            write(tmp_path / "s", job(10, other(1), rewrites=True))
    assert write(tmp_path / "s", job(10, other(1), rewrites=True)).nothing_to_do
    assert verify(str(tmp_path / "s")).ok


# ------------------------------------------------------------------------------- an append that is taken back

WITH_NAMES = Layout(4, 2, (*LAYOUT.arrays, ArrayLayout("id", STRING, ("sample",))))


class Named(Make):
    def __call__(self, span: Span) -> Any:
        made = CountRows(self, span)().blocks["x"]
        names = np.array([f"{number}" for number in range(span.start, span.stop)], object)
        return lambda: Made({"x": made, "id": names})


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("rows", [8, 10])
@pytest.mark.parametrize("moment", ["written", "recorded", "publishing"])
def test_an_interrupted_append_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, moment: str
) -> None:
    work = job(rows, Named(), layout=WITH_NAMES)
    write(tmp_path / "s", work)
    before = objects(tmp_path / "s")

    def stopped(self: RowStore, members: object) -> None:
        self._with_arrays()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "_finished", stopped)
        interrupted(tmp_path / "s", replace(work, rows=25), {"written": 12, "recorded": 16, "publishing": -1}[moment])
    assert objects(tmp_path / "s") != before
    found = RowStore.open(str(tmp_path / "s"))
    assert (found.interrupted, found.rows) == (True, rows)
    result = write(tmp_path / "s", work)
    assert (result.rows, result.rows_written) == (rows, 0)
    assert objects(tmp_path / "s") == before
    assert verify(str(tmp_path / "s")).ok
    assert write(tmp_path / "s", replace(work, rows=25)).rows == 25
    assert verify(str(tmp_path / "s")).ok


def test_an_append_is_not_taken_back_where_the_published_rows_are_lost(tmp_path: Path) -> None:
    work = job(10, Named(), layout=WITH_NAMES)
    write(tmp_path / "s", work)
    interrupted(tmp_path / "s", replace(work, rows=25), 12)
    shard = tmp_path / "s/x/c.2.0"
    layout = RowStore.open(str(tmp_path / "s")).layout
    other = layout.encode("x", np.ones((4, 2), np.float32))
    for content in (b"".join(map(bytes, other)), b"", shard.read_bytes()[:-1]):
        shard.write_bytes(content)
        with pytest.raises(Corrupt, match=r"shard 2 of .* does not begin with its published rows|c.2.0"):
            write(tmp_path / "s", work)
        assert shard.read_bytes() == content


@pytest.mark.usefixtures("small_packs")
@pytest.mark.parametrize("published", [0, 10])
def test_shards_beyond_the_end_that_an_interrupted_run_left_are_deleted(tmp_path: Path, published: int) -> None:
    for place in ("s", "undisturbed"):
        if published:
            write(tmp_path / place, job(published, Make()))
    interrupted(tmp_path / "s", job(30, Make()), 30)
    for place in ("s", "undisturbed"):
        assert write(tmp_path / place, job(13, Make())).rows == 13
    assert {**objects(tmp_path / "s"), "zarr.json": b""} == {**objects(tmp_path / "undisturbed"), "zarr.json": b""}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    write(tmp_path / "one", job(50, Make()))
    write(tmp_path / "s", job(50, Make(), threads=threads))
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.usefixtures("small_packs")
def test_interrupted_listener_leaves_no_thread_and_no_lease(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "progress" and event.done >= 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", job(50, Make(), threads=3), on_event=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    make = Make()
    assert write(tmp_path / "s", job(50, make)).rows == 50
    assert len(make.made) < 13


def test_reused_block() -> None:
    one = reused_block((3, 4), np.dtype("f4"))
    assert (one.shape, one.dtype) == ((3, 4), np.float32)
    assert np.shares_memory(one, reused_block((2, 3), np.dtype("u1")))
    assert reused_block((0, 4), np.dtype("f8")).shape == (0, 4)


def test_a_plan_says_what_a_run_takes() -> None:
    work = job(10, Make(), task_bytes=1_000_000)
    plan = Plan(work, (range(1, 3),), 0, 0)
    assert (plan.rows, plan.shards, plan.shards_per_region) == (6, 2, 1)
    assert str(plan).startswith("2 of 3 shards to write, about 0.0 MB, 1 MB of memory")
    assert str(Plan(work, (), 0, 0)) == ""


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("tile", [1, 4])
def test_regions_keep_to_packs_and_tiles(monkeypatch: pytest.MonkeyPatch, slots: int, tile: int) -> None:
    monkeypatch.setattr(Layout, "shards_per_tile", tile)
    work = job(4 * 1000 - 1, Make())
    pending = (range(5, 8), range(8, 16), range(24, 32), range(40, 1000))
    regions = list(Plan(work, pending, 20, slots).regions())
    assert [shard for region in regions for shard in region] == [shard for part in pending for shard in part]
    for region in regions:
        assert any(region.start >= part.start and region.stop <= part.stop for part in pending), "it spans two packs"
        ends = {part.stop for part in pending}
        assert region.stop in ends or region.stop % tile == 0, "it cuts a tile"
        assert len(region) <= (tile if not slots else max(16, tile))


def test_a_region_is_small_enough_for_every_slot() -> None:
    work = job(4 * 1000, Make())
    sizes = {slots: Plan(work, (range(1000),), 0, slots).shards_per_region for slots in (0, 1, 25, 1000)}
    assert sizes == {0: 1, 1: 16, 25: 10, 1000: 1}


def test_memory_of_a_task_counts_the_moments_of_wide_rows() -> None:
    """A row of 4 million float32 is 16 MB, but its mean, squares, minimum and maximum are 32 MB each."""
    layout = Layout.of((ArrayLayout("x", "<f4", ("sample", "feature"), (4_000_000,)),))
    wide = job(10, Make(), layout=layout)
    assert layout.shard_bytes == 16_000_000
    assert wide.memory > 16_000_000 + 4 * 32_000_000
    with pytest.raises(InvalidInput, match="may use 100 MB"):
        wide.require_memory(SmallCluster())
