"""The write protocol with a made-up verb."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.cluster import Job, Made, Output, Plan, Span, reused_block
from cvae_dist.errors import Corrupt, InvalidInput, SettingsChanged, StorageFailed
from cvae_dist.events import Event, ignore
from cvae_dist.store import ArrayLayout, Layout, Location, RowStore
from cvae_dist.verbs.verify import verify

LAYOUT = Layout(4, 2, (ArrayLayout("x", "<f4", ("sample", "feature"), (2,)),))


@dataclass(frozen=True)
class CountRows:
    """The task of a shard: rows counted from 0."""

    make: "Make"
    span: Span

    @property
    def identity(self) -> str:
        self.make.identified.append(self.span.shard)
        return self.make.identity(self.span)

    def __call__(self) -> Made:
        self.make.made.append(self.span.shard)
        return Made({"x": np.repeat(np.arange(self.span.start, self.span.stop, dtype=np.float32), 2).reshape(-1, 2)})


class Make:
    """Makes tasks; remembers the shards that were asked for, identified and made."""

    def __init__(self, identity: Callable[[Span], str] = lambda span: "") -> None:
        self.identity = identity
        self.asked: list[int] = []
        self.identified: list[int] = []
        self.made: list[int] = []

    def __call__(self, span: Span) -> CountRows:
        self.asked.append(span.shard)
        return CountRows(self, span)


def job(rows: int, make: Callable[[Span], Any], **changes: Any) -> Job:
    return replace(Job("rows", LAYOUT, rows, {"a": 1}, make), **changes)


def write(path: Path, work: Job, overwrite: bool = False, client: Any = None, on_event: Any = ignore) -> Any:
    with Output.held(Location.of(path), "test", overwrite=overwrite, client=client, on_event=on_event) as output:
        return output.write(work)


def test_task_and_identity_of_a_shard_are_asked_for_once_a_run(tmp_path: Path) -> None:
    fresh = Make()
    write(tmp_path / "s", job(10, fresh))
    assert sorted(fresh.asked) == sorted(fresh.identified) == sorted(fresh.made) == [0, 1, 2]
    done = Make()
    write(tmp_path / "s", job(10, done))
    assert (done.asked, done.identified, done.made) == ([0, 1, 2], [0, 1, 2], [])
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
            write(tmp_path / "s", job(rows, Make(lambda span: "other")))
    changed_tail = job(10, Make(lambda span: "other" if span.shard == 2 else ""))
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


class TooFewRows:
    identity = ""

    def __call__(self) -> Made:
        return Made({"x": np.zeros((1, 2), np.float32)})


def test_not_the_whole_shard(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not the whole shard"):
        write(tmp_path / "s", job(10, lambda span: TooFewRows()))


def test_a_record_that_vanished_or_changed_during_the_run_is_not_published(tmp_path: Path) -> None:
    make = Make()

    def meddle(event: Event) -> None:
        if event.done == 10 and event.kind == "progress":
            (tmp_path / "s/ledger/record/c/0/0").write_bytes((tmp_path / "s/ledger/record/c/1/0").read_bytes())

    with pytest.raises(StorageFailed, match="shard 0 of .* was changed by another writer"):
        write(tmp_path / "s", job(10, make), on_event=meddle)
    assert write(tmp_path / "s", job(10, make)).rows == 10
    assert make.made == [0, 1, 2, 0]
    assert verify(str(tmp_path / "s")).ok


def test_lost_record_of_a_published_shard(tmp_path: Path) -> None:
    write(tmp_path / "s", job(10, Make()))
    (tmp_path / "s/ledger/record/c/1/0").unlink()
    for rows, first_shard in ((10, 0), (17, 0), (17, 2)):
        with pytest.raises(Corrupt, match="record of shard 1 is missing"):
            write(tmp_path / "s", job(rows, Make(), first_shard=first_shard))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_do_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    write(tmp_path / "one", job(50, Make()))
    write(tmp_path / "s", job(50, Make(), threads=threads))
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "one")).read_bytes()


def test_interrupted_listener_leaves_no_thread_and_no_lease(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", job(50, Make(), threads=3), on_event=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    make = Make()
    assert write(tmp_path / "s", job(50, make)).rows == 50
    assert 0 not in make.made


def test_reused_block() -> None:
    one = reused_block((3, 4), np.dtype("f4"))
    assert (one.shape, one.dtype) == ((3, 4), np.float32)
    assert np.shares_memory(one, reused_block((2, 3), np.dtype("u1")))
    assert reused_block((0, 4), np.dtype("f8")).shape == (0, 4)


def test_a_plan_says_what_a_run_takes() -> None:
    work = job(10, Make(), task_bytes=1_000_000)
    pending = tuple(work.spans())
    plan = Plan(work, pending[1:], 0)
    size = work.layout.rows_per_shard
    assert (plan.rows, plan.shards_per_region) == (10 - size, 1)
    assert str(plan).startswith(f"{len(pending) - 1} of {len(pending)} shards to write, about 0.0 MB, 1 MB of memory")
    assert [span for region in Plan(work, pending, 1).regions() for span in region] == list(work.spans())
    assert str(Plan(work, (), 0)) == ""
