"""What a running command shows, in each of its four ways."""

import json
import math

import pytest

from cvae_dist.errors import StorageFailed
from cvae_dist.events import Event
from cvae_dist.progress import (
    Display,
    JsonLines,
    LiveBars,
    LogRecords,
    Pace,
    PlainLines,
    duration,
    error_text,
    figure,
    open_display,
)

STAGE = [
    Event("train", "start", 100, 400, "steps", "going on"),
    Event("train", "progress", 200, 400, "steps", values={"loss": 12.345678, "rows_per_second": 9e9}),
    Event("train", "note", message="a remark"),
    Event("train", "done", 400, 400, "steps"),
]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (185, "3:05 min"),
        (7620, "2:07 h"),
    ],
)
def test_durations_are_as_precise_as_they_need_to_be(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figures_have_separators_or_four_digits() -> None:
    assert [figure(value) for value in (1234567, 0.123456, "x", True)] == ["1,234,567", "0.1235", "x", "True"]


def test_the_pace_counts_only_what_this_run_did() -> None:
    pace = Pace()
    assert math.isnan(pace.rate(100))
    pace.started -= 10
    assert pace.rate(150) == pytest.approx(5, rel=0.01)


def test_plain_lines_are_few_and_say_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvae_dist.progress.SECONDS_BETWEEN_LINES", 0.0)
    display = PlainLines()
    display(STAGE[0])
    display._paces["train"].started -= 10
    for event in STAGE[1:]:
        display(event)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert lines[0] == "train: 100/400 steps, going on"
    assert lines[1] == "train: 200/400 steps, 10 steps/s, 20 s left, loss 12.35"
    assert lines[2] == "train: a remark"
    assert lines[3].startswith("train: 400/400 steps, 30 steps/s")


def test_a_bar_goes_on_where_a_training_starts_again() -> None:
    shown = []
    with LiveBars() as bars:
        for event in [*STAGE[:2], STAGE[0], *STAGE[1:]]:
            bars(event)
            (bar,) = bars._progress.tasks
            shown.append((bar.completed, bar.total))
    assert shown == [(100, 400), (200, 400), (100, 400), (200, 400), (200, 400), (400, 400)]


@pytest.mark.parametrize("display", [PlainLines(), LiveBars(), LogRecords()])
def test_a_rank_that_hears_nothing_shows_nothing(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    with display:
        pass
    assert capsys.readouterr() == ("", "")


def test_progress_within_seconds_of_the_last_line_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    display = PlainLines()
    for event in [STAGE[0], *[STAGE[1]] * 50, STAGE[3]]:
        display(event)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_json_lines_are_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonLines()
    display(Event("train", "progress", values={"loss": math.nan}))
    display.result("done", {"figures": (1, math.inf)})
    display.__exit__(StorageFailed, StorageFailed(28, "no room"), None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["progress", "result", "error"]
    assert lines[0]["values"] == {"loss": None}
    assert lines[1]["figures"] == [1, None]
    assert lines[2]["message"] == "no room"


@pytest.mark.parametrize("display", [Display(), PlainLines(), LiveBars()])
def test_results_go_to_stdout_and_all_else_to_stderr(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    with display:
        for event in STAGE:
            display(event)
    display.result("all done", {})
    display.table(("stage", "output"), [("train", "a/very/long/path[1]")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [
        ["all", "done"],
        [],
        ["stage", "output"],
        ["train", "a/very/long/path[1]"],
    ]


def test_the_display_fits_where_the_output_goes() -> None:
    assert isinstance(open_display(as_json=True, quiet=True), JsonLines)
    assert type(open_display(quiet=True)) is Display
    assert isinstance(open_display(), PlainLines)


def test_an_error_of_the_system_is_told_without_its_number() -> None:
    assert error_text(PermissionError(13, "Permission denied", "a.zarr")) == "Permission denied: a.zarr"
    assert error_text(StorageFailed(28, "no room left")) == "no room left"
    assert error_text(ValueError()) == "ValueError"
