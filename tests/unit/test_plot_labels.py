"""Labels on maps: those that are missing, booleans, dates, durations, long names; and that every row is counted."""

import datetime
from typing import Any

import numpy as np
import pandas
import pytest
from matplotlib.colors import to_hex, to_rgba

from cvae_dist import plot
from cvae_dist.plot.labels import NO_LABEL, Classes, Quantity, as_labels, classify, shortened
from cvae_dist.plot.palette import NO_LABEL_COLOUR, PALETTE

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(2000, 2))
GREY = to_rgba(NO_LABEL_COLOUR)[:3]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def laid_out(figure: Any) -> Any:
    """Return the axes of a figure whose layout is done."""
    figure.draw_without_rendering()
    return figure.axes[0]


class TestMissing:
    @pytest.mark.parametrize(
        "labels",
        [
            np.array([0.0, 1.0, np.nan]),
            np.array([0, 1, None], dtype=object),
            np.array([0.0, 1.0, np.nan], dtype=object),
            [0, 1, None],
            ["0", "1", np.nan],
            ["0", "1", ""],
            np.array(["0", "1", ""], dtype=np.dtypes.StringDType()),
            np.array(["0", "1", "nan"]),
            pandas.Series([0, 1, None], dtype="Int64"),
            pandas.Series([0, 1, None], dtype="Float64"),
            pandas.Series(["0", "1", None], dtype="string"),
            pandas.Categorical(["0", "1", None]),
        ],
    )
    def test_the_others_stay_classes(self, labels: Any) -> None:
        classes = classify(as_labels(labels))
        assert isinstance(classes, Classes)
        assert classes.names == ("0", "1")
        np.testing.assert_array_equal(classes.codes, [0, 1, NO_LABEL])

    def test_indices_of_categories_may_be_missing(self) -> None:
        classes = classify(np.array([1.0, np.nan]), ["cat", "dog"])
        assert isinstance(classes, Classes)
        np.testing.assert_array_equal(classes.codes, [1, NO_LABEL])

    def test_rows_without_a_label_are_grey_behind_the_others_and_counted(self) -> None:
        labels = np.where(RNG.random(2000) < 0.95, np.nan, RNG.integers(0, 3, 2000))
        missing = int(np.isnan(labels).sum())
        axes = plot.scatter_latents(Z, labels).axes[0]
        (points,) = axes.collections
        assert len(points.get_offsets()) == 2000
        assert legend(axes) == ["0", "1", "2", f"no label ({missing:,})"]
        is_grey = np.all(np.isclose(points.get_facecolors()[:, :3], GREY), axis=1)
        np.testing.assert_array_equal(is_grey, np.arange(2000) < missing)
        assert axes.get_title() == "2,000 rows in 2 latent dimensions"

    def test_no_row_has_one(self) -> None:
        for labels in (np.full(2000, np.nan), [None] * 2000, np.full(2000, np.timedelta64("NaT", "s"))):
            assert legend(plot.scatter_latents(Z, labels).axes[0]) == ["no label (2,000)"]

    def test_of_a_quantity(self) -> None:
        labels = Z[:, 0].copy()
        labels[:700] = np.nan
        figure = plot.scatter_latents(Z, labels)
        figure.draw_without_rendering()
        (points,) = figure.axes[0].collections
        is_grey = np.all(np.isclose(points.get_facecolors()[:, :3], GREY), axis=1)
        np.testing.assert_array_equal(is_grey, np.arange(2000) < 700)
        assert legend(figure.axes[1]) == ["no label\n(700)"]

    def test_in_histograms(self) -> None:
        axes = plot.scatter_latents(Z[:, :1], np.where(Z[:, 0] > 0, "a", "")).axes[0]
        ticks = {tick.get_text(): place for tick, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
        assert ticks == {"a": 0, f"no label ({(Z[:, 0] <= 0).sum():,})": -1}


class TestEveryRowIsCounted:
    def test_that_is_not_finite(self) -> None:
        z = Z.copy()
        z[:3, 1] = np.nan, np.inf, -np.inf
        title = plot.scatter_latents(z).axes[0].get_title()
        assert title == "1,997 of 2,000 rows in 2 latent dimensions\n(3 not finite)"

    def test_whatever_the_title(self) -> None:
        z = np.concatenate([Z, [[1e6, 0.0], [np.nan, 0.0]]])
        title = plot.scatter_latents(z, title="Mine", total=9000).axes[0].get_title()
        assert title == "Mine\n(6,998 left out to draw fewer, 1 not finite, 1 outside the picture)"

    def test_that_has_no_place_for_want_of_a_label(self) -> None:
        labels = Z[:, 0].copy()
        labels[:1900] = np.nan
        axes = plot.scatter_latents(Z[:, :1], labels).axes[0]
        assert len(axes.collections[0].get_offsets()) == 100
        assert axes.get_title() == "100 of 2,000 rows in 1 latent dimension\n(1,900 without a label)"

    def test_of_reconstructions(self) -> None:
        title = plot.compare_rows(np.zeros((3, 4)), np.ones((3, 4)), (2, 2), total=1000).axes[0].get_title()
        assert title.startswith("3 of 1,000 rows")


class TestKinds:
    @pytest.mark.parametrize(
        "labels",
        [
            np.array([True, False, True]),
            [True, False, True],
            pandas.Series([True, False, True]),
            pandas.Series([True, False, True], dtype="boolean"),
        ],
    )
    def test_booleans_are_false_and_true(self, labels: Any) -> None:
        assert legend(plot.scatter_latents(Z[:3], labels).axes[0]) == ["False", "True"]

    @pytest.mark.parametrize(
        "labels",
        [
            np.array(["2020-01-01", "2021-01-01", "NaT"], "datetime64[D]"),
            np.array(["2020-01", "2021-01", "NaT"], "datetime64[M]"),
            [datetime.date(2020, 1, 1), datetime.date(2021, 1, 1), None],
            [datetime.datetime(2020, 1, 1), datetime.datetime(2021, 1, 1), None],
            pandas.Series(pandas.to_datetime(["2020-01-01", "2021-01-01", None])),
            pandas.Series(pandas.to_datetime(["2020-01-01", "2021-01-01", None])).dt.tz_localize("UTC"),
            pandas.to_datetime(["2020-01-01", "2021-01-01", None]),
        ],
    )
    def test_dates_are_days(self, labels: Any) -> None:
        quantity = classify(as_labels(labels))
        assert isinstance(quantity, Quantity)
        assert quantity.dates
        np.testing.assert_array_equal(quantity.values, [18262, 18628, np.nan])

    def test_dates_get_a_colour_bar_of_dates(self) -> None:
        taken = np.datetime64("2019-03-01") + np.arange(2000)
        figure = plot.scatter_latents(Z, taken, label_name="taken")
        figure.draw_without_rendering()
        bar = figure.axes[1]
        assert bar.get_ylabel() == "taken"
        assert {"2020", "2021", "2022", "2023", "2024"} <= {tick.get_text() for tick in bar.get_yticklabels()}

    def test_dates_are_dates_on_an_axis_too(self) -> None:
        taken = np.datetime64("2019-03-01") + np.arange(2000)
        axes = laid_out(plot.scatter_latents(Z[:, :1], taken, label_name="taken"))
        assert {"2020", "2021", "2022"} <= {tick.get_text() for tick in axes.get_yticklabels()}

    @pytest.mark.parametrize(
        ("longest", "unit", "value"),
        [("90D", "days", 90), ("90min", "hours", 1.5), ("2ms", "milliseconds", 2), ("3us", "microseconds", 3)],
    )
    def test_durations_have_a_unit(self, longest: str, unit: str, value: float) -> None:
        for labels in (
            pandas.Series(pandas.to_timedelta(["0s", longest, None])),
            np.array([0, pandas.Timedelta(longest).value, "NaT"], "timedelta64[ns]"),
            [datetime.timedelta(0), pandas.Timedelta(longest).to_pytimedelta(), None],
        ):
            quantity = classify(as_labels(labels))
            assert isinstance(quantity, Quantity)
            assert quantity.unit == unit
            np.testing.assert_allclose(quantity.values, [0, value, np.nan])

    def test_one_date_has_a_scale_around_it(self) -> None:
        figure = plot.scatter_latents(Z, np.full(2000, np.datetime64("2020-01-01")))
        assert figure.axes[0].collections[0].get_clim() == (18261.5, 18262.5)

    def test_large_integers_are_told_apart(self) -> None:
        classes = classify(np.array([2**60 + 1, 2**60]))
        assert isinstance(classes, Classes)
        assert classes.names == (str(2**60), str(2**60 + 1))
        quantity = classify(2**60 + np.arange(30))
        assert isinstance(quantity, Quantity)
        assert quantity.values.dtype == np.float64

    def test_the_unit_stands_on_the_colour_bar(self) -> None:
        figure = plot.scatter_latents(Z, np.arange(2000) * np.timedelta64(10, "s"), label_name="age")
        assert figure.axes[1].get_ylabel() == "age (hours)"

    def test_the_infinite_have_the_colours_of_the_ends(self) -> None:
        quantity = classify(np.array([0.5, np.inf, -np.inf, 2.5]))
        assert isinstance(quantity, Quantity)
        np.testing.assert_array_equal(quantity.values, [0.5, 2.5, 0.5, 2.5])

    @pytest.mark.parametrize("n", [1000, 100_000])
    def test_points_have_the_colours_of_the_bar(self, n: int) -> None:
        value = RNG.random(n)
        figure = plot.scatter_latents(RNG.normal(size=(n, 2)), value)
        figure.draw_without_rendering()
        points = figure.axes[0].collections[0].get_facecolors()[:200]
        bar = max((collection.get_facecolors() for collection in figure.axes[1].collections), key=len)
        assert len(bar) == 256
        assert {to_hex(colour, keep_alpha=True) for colour in points} <= {to_hex(c, keep_alpha=True) for c in bar}


class TestNames:
    LONG = "Pseudonocardia autotrophica subsp. amethystina, " * 3

    def test_long_ones_are_shortened_in_the_middle(self) -> None:
        assert shortened("short") == "short"
        assert shortened(self.LONG) == "Pseudonocard…methystina,"
        assert len(shortened(self.LONG)) == 24

    def test_the_map_keeps_its_size(self) -> None:
        sizes = []
        for name in ("b", self.LONG):
            figure = plot.scatter_latents(Z, np.where(Z[:, 0] > 0, "a", name))
            axes = laid_out(figure)
            sizes.append(axes.bbox.size)
            assert axes.get_legend().get_window_extent().x1 <= figure.bbox.x1
        np.testing.assert_allclose(*sizes, rtol=0.01)

    def test_twenty_classes_beside_a_flat_map_are_all_there(self) -> None:
        figure = plot.scatter_latents(Z * [2.9, 1], np.arange(2000) % 20)
        axes = laid_out(figure)
        assert len(legend(axes)) == 20
        assert axes.get_legend().get_window_extent().y0 >= 0

    @pytest.mark.parametrize("n_dims", [2, 3])
    def test_marks_do_not_overprint(self, n_dims: int) -> None:
        classes = np.arange(2000) % 10
        z = RNG.normal(size=(2000, n_dims)) + 0.3 * RNG.normal(size=(10, n_dims))[classes]
        axes = laid_out(plot.scatter_latents(z, [f"class {i}" for i in classes]))
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 10
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]

    def test_a_mark_does_not_hide_the_few_rows_of_its_class(self) -> None:
        axes = plot.scatter_latents(Z[:102], ["a"] * 100 + ["b"] * 2).axes[0]
        assert [text.get_text() for text in axes.texts] == ["a"]

    @pytest.mark.parametrize("name", ["$^$", "_hidden", "two\nlines", " "])
    def test_signs_of_matplotlib_mean_nothing(self, name: str) -> None:
        axes = laid_out(plot.scatter_latents(Z, [name] * 1000 + ["b"] * 1000))
        assert len(legend(axes)) == 2

    def test_a_class_may_be_called_other(self) -> None:
        classes = classify(np.array(["other (things)", "a"]))
        assert isinstance(classes, Classes)
        assert classes.colours == list(PALETTE[:2])
