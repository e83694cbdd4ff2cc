"""Pictures: what is on them, checked through matplotlib's own objects, and the errors."""

import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from cvae_dist import plot
from cvae_dist.cli import main
from cvae_dist.errors import InvalidInput, MissingExtra, SourceNotFound
from cvae_dist.plot.figure import DPI
from cvae_dist.plot.labels import Classes, Quantity, classify
from cvae_dist.plot.palette import NO_LABEL_COLOUR, OTHER_COLOUR, PALETTE
from cvae_dist.plot.points import PIXELS
from cvae_dist.plot.tiles import as_images
from cvae_dist.verbs import plot as verbs

RNG = np.random.default_rng(0)
Z = np.random.default_rng(1).normal(size=(200, 2))


def texts(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.texts}


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def linear_decoder(dim_latent: int, n_features: int) -> Any:
    weights = np.random.default_rng(1).normal(size=(dim_latent, n_features)).astype(np.float32)
    return lambda z: z @ weights


class TestClassify:
    def test_strings_are_classes_in_order(self) -> None:
        classes = classify(np.array(["b", "a", "b"], dtype=object))
        assert isinstance(classes, Classes)
        assert classes.names == ("a", "b")
        np.testing.assert_array_equal(classes.codes, [1, 0, 1])

    def test_digits_as_strings_sort_as_numbers(self) -> None:
        classes = classify(np.array(["10", "2", "2"]))
        assert isinstance(classes, Classes)
        assert classes.names == ("2", "10")

    @pytest.mark.parametrize("labels", [np.arange(21), np.array([0.5, 1.0]), np.array([0.5, np.nan])])
    def test_other_numbers_are_a_quantity(self, labels: np.ndarray) -> None:
        quantity = classify(labels)
        assert isinstance(quantity, Quantity)
        np.testing.assert_array_equal(quantity.values, labels)

    def test_rare_classes_are_put_together(self) -> None:
        labels = np.repeat([f"c{i:02}" for i in range(30)], np.arange(1, 31))
        classes = classify(labels)
        assert isinstance(classes, Classes)
        assert classes.names == (*(f"c{i}" for i in range(11, 30)), "other (11 classes)")
        assert np.count_nonzero(classes.codes == 19) == sum(range(1, 12))
        assert classes.colours[-1] == OTHER_COLOUR
        assert len(set(classes.colours)) == 20

    def test_categories_name_indices(self) -> None:
        classes = classify(np.array([2, 0]), ["cat", "dog", "emu"])
        assert isinstance(classes, Classes)
        assert [classes.names[code] for code in classes.codes] == ["emu", "cat"]

    def test_missing_category_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="0 to 2 with 2 categories"):
            classify(np.array([2, 0]), ["cat", "dog"])


def _oklab(colours: tuple[str, ...], simulation: np.ndarray) -> np.ndarray:
    """Oklab (Ottosson 2020) of sRGB colours seen through a matrix on linear RGB."""
    srgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(np.clip(linear @ simulation.T, 0, 1) @ lms.T) @ lab.T


# Machado, Oliveira, Fernandes (2009), severity 1.0, and normal sight.
SIGHTS = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


@pytest.mark.parametrize(("n_classes", "least"), [(10, 0.14), (20, 0.07)])
@pytest.mark.parametrize("sight", SIGHTS)
def test_palette_is_distinct_to_every_sight(sight: str, n_classes: int, least: float) -> None:
    lab = _oklab(PALETTE[:n_classes], SIGHTS[sight])
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(n_classes, 1)]
    assert distance.min() > least


@pytest.mark.parametrize("sight", SIGHTS)
def test_palette_is_distinct_from_the_greys_and_from_the_paper(sight: str) -> None:
    lab = _oklab((*PALETTE, OTHER_COLOUR, NO_LABEL_COLOUR, "#ffffff"), SIGHTS[sight])
    distance = np.linalg.norm(lab[:20, None] - lab[None, 20:], axis=2)
    assert distance.min() > 0.06


def test_palette_has_neither_pure_nor_too_pale_colours() -> None:
    assert len(set(PALETTE)) == 20
    lightness = _oklab(PALETTE, SIGHTS["normal"])[:, 0]
    assert 0.3 < lightness.min() < lightness.max() < 0.9
    assert not {"#0000ff", "#00ff00", "#ff0000"} & set(PALETTE)


class TestScatter:
    def test_classes_get_a_legend_and_their_names_on_the_points(self) -> None:
        z = RNG.normal(size=(300, 2))
        figure = plot.scatter_latents(z, np.repeat(["a", "b", "c"], 100), label_name="species")
        (axes,) = figure.axes
        assert legend(axes) == ["a", "b", "c"]
        assert axes.get_legend().get_title().get_text() == "species"
        assert texts(axes) == {"a", "b", "c"}
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("z1", "z2")
        assert "300 rows in 2 latent dimensions" in axes.get_title()

    def test_every_point_has_the_colour_of_its_class(self) -> None:
        z = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        figure = plot.scatter_latents(z, ["a", "b", "a"])
        points = figure.axes[0].collections[0]
        colour_of = {
            float(x): tuple(c[:3]) for x, c in zip(points.get_offsets()[:, 0], points.get_facecolors(), strict=True)
        }
        assert colour_of[0.0] == colour_of[2.0] != colour_of[1.0]

    def test_a_quantity_gets_a_named_colour_bar(self) -> None:
        z = RNG.normal(size=(50, 2))
        figure = plot.scatter_latents(z, np.linspace(0, 1, 50), label_name="mass")
        assert figure.axes[1].get_ylabel() == "mass"

    def test_points_shrink_as_they_become_more(self) -> None:
        few, many = (plot.scatter_latents(RNG.normal(size=(n, 2))).axes[0].collections[0] for n in (500, 50_000))
        assert few.get_sizes()[0] > 5 * many.get_sizes()[0]
        assert few.get_alpha() > many.get_alpha()

    def test_many_dimensions_show_their_principal_axes(self) -> None:
        scale = np.array([0.1, 5.0, 0.1, 2.0])
        z = RNG.normal(size=(2000, 4)) * scale
        (axes,) = plot.scatter_latents(z).axes
        assert axes.get_xlabel().startswith("principal axis 1 of 4 (86 % of the variance)")
        offsets = np.asarray(axes.collections[0].get_offsets())
        np.testing.assert_allclose(np.sort(np.abs(offsets.std(axis=0))), [2.0, 5.0], rtol=0.1)

    @pytest.mark.parametrize("labels", [None, np.repeat(["a", "b"], 50), np.linspace(0, 1, 100)])
    def test_one_dimension(self, labels: Any) -> None:
        (axes,) = plot.scatter_latents(RNG.normal(size=(100, 1)), labels, label_name="kind").axes
        assert axes.get_xlabel() == "z1"
        assert axes.get_ylabel()

    def test_outliers_do_not_squeeze_the_rest_and_are_counted(self) -> None:
        z = np.concatenate([RNG.normal(size=(20_000, 2)), [[1e6, 0.0], [0.0, -1e6]]])
        (axes,) = plot.scatter_latents(z).axes
        assert axes.get_xlim()[1] < 20
        assert "(2 outside the picture)" in axes.get_title()

    def test_rows_that_are_not_finite_are_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        z = RNG.normal(size=(100, 2))
        z[3, 1] = np.nan
        figure = plot.scatter_latents(z, ["a"] * 100)
        assert len(figure.axes[0].collections[0].get_offsets()) == 99
        assert "1 of 100" in caplog.text

    @pytest.mark.parametrize("labels", ["classes", "quantity", None])
    def test_density_above_a_hundred_thousand(self, labels: str | None) -> None:
        pytest.importorskip("datashader")
        z = RNG.normal(size=(100_001, 2)).astype(np.float32)
        z[:50_000, 0] += 20
        given = {"classes": np.where(z[:, 0] > 10, "right", "left"), "quantity": z[:, 0]}.get(labels or "")
        figure = plot.scatter_latents(z, given)
        axes = figure.axes[0]
        assert not axes.collections
        image = axes.images[0].get_array()
        assert image.shape[:2] == (PIXELS, PIXELS)
        if labels == "classes":
            assert legend(axes) == ["left", "right"]
            drawn = image[image[..., 3] > 0]
            assert 0.5 < (drawn[:, 2] > drawn[:, 0]).mean() + 0.25 < 1.0  # both brown and blue are there
        else:
            assert len(figure.axes) == 2

    @pytest.mark.parametrize("labels", [pytest.param("classes", marks=pytest.mark.heavy), "quantity"])
    def test_rows_without_a_label_lie_behind_a_density(self, labels: str) -> None:
        pytest.importorskip("datashader")
        z = np.repeat([[0.0, 0.0], [1.0, 1.0]], 50_001, axis=0)
        known = np.zeros(50_001) if labels == "classes" else np.linspace(0, 1, 50_001)
        figure = plot.scatter_latents(z, np.concatenate([known, np.full(50_001, np.nan)]))
        behind, above = figure.axes[0].images
        unlabelled, shown = behind.get_array(), above.get_array()
        assert behind.get_cmap()(0) == to_rgba(NO_LABEL_COLOUR)
        assert unlabelled.count() == 1, "one pixel"
        drawn = shown[..., 3] > 0 if labels == "classes" else ~np.ma.getmaskarray(shown)
        assert drawn.any()
        assert not (drawn & ~np.ma.getmaskarray(unlabelled)).any()

    @pytest.mark.parametrize(
        ("z", "labels", "message"),
        [
            (np.zeros((0, 2)), None, "shape"),
            (np.zeros(5), None, "shape"),
            (np.zeros((3, 2)), ["a"], "3 latent rows"),
            (np.full((3, 2), np.nan), None, "finite"),
        ],
    )
    def test_unusable_input_is_refused(self, z: np.ndarray, labels: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            plot.scatter_latents(z, labels)


def test_grey_pictures_are_stored_grey_and_coloured_ones_in_colour(tmp_path: Path) -> None:
    figure = plot.compare_rows(np.zeros((2, 4)), np.ones((2, 4)), (2, 2))
    figure.set_layout_engine("none")  # it moves things a little every time the figure is drawn
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plot.write_figure(figure, str(tmp_path / "grey.png"))
    plot.write_figure(plot.scatter_latents(np.eye(2), ["a", "b"]), str(tmp_path / "colour.png"))
    with Image.open(tmp_path / "grey.png") as grey, Image.open(drawn) as before:
        assert grey.mode == "L"
        np.testing.assert_array_equal(np.asarray(grey), np.asarray(before)[..., 0])
    with Image.open(tmp_path / "colour.png") as colour:
        assert colour.mode == "RGB"
    figure.patch.set_alpha(0)
    plot.write_figure(figure, str(tmp_path / "clear.png"))
    with Image.open(tmp_path / "clear.png") as clear:
        assert clear.mode == "RGBA"


class TestGrid:
    def test_codes_are_the_normal_quantiles_with_y_upwards(self) -> None:
        seen = []
        decode = linear_decoder(2, 12)
        plot.latent_grid(lambda z: seen.append(z) or decode(z), 2, (3, 4), grid_size=3)
        codes = seen[-1].reshape(3, 3, 2)
        quantiles = [-0.967422, 0.0, 0.967422]  # of 1/6, 1/2, 5/6: standard normal tables
        np.testing.assert_allclose(codes[0, :, 0], quantiles, atol=1e-5)
        np.testing.assert_allclose(codes[:, 0, 1], quantiles[::-1], atol=1e-5)

    def test_range_gives_cell_centres_and_ticks(self) -> None:
        (axes, _) = plot.latent_grid(linear_decoder(2, 4), 2, (2, 2), xy_range=(-4, 4), grid_size=4).axes
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["-3", "-1", "1", "3"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["-3", "-1", "1", "3"]
        assert axes.get_yticks()[0] > axes.get_yticks()[-1]  # the lowest z2 is at the bottom of the picture

    def test_tiles_stand_where_their_latents_say(self) -> None:
        figure = plot.latent_grid(lambda z: np.repeat(z[:, :1] + 10 * z[:, 1:], 4, axis=1), 2, (2, 2), grid_size=3)
        canvas = figure.axes[0].images[0].get_array()
        assert canvas.shape == (6, 6)
        assert canvas[0, 0] > 9 - 1
        assert canvas[0, 5] > canvas[0, 0] > canvas[5, 5] > canvas[5, 0]

    def test_clip_bounds_the_values_and_the_grey(self) -> None:
        figure = plot.latent_grid(lambda z: 100 * np.repeat(z[:, :1], 4, axis=1), 2, (2, 2), clip=(0, 255))
        image = figure.axes[0].images[0]
        assert image.get_clim() == (0, 255)
        assert image.get_array().min() == 0

    def test_rows_that_are_no_images_become_lines(self) -> None:
        figure = plot.latent_grid(linear_decoder(2, 30), 2, (30,), grid_size=4)
        (axes,) = figure.axes
        assert not axes.images
        assert len(axes.collections[0].get_segments()) == 16

    def test_the_two_most_influential_of_many_coordinates_are_varied(self) -> None:
        decode = lambda z: np.stack([z[:, 0], 5 * z[:, 2], 3 * z[:, 4], z[:, 1]], axis=1)  # noqa: E731
        (axes, _) = plot.latent_grid(decode, 5, (2, 2), grid_size=3).axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("z3", "z5")

    def test_one_coordinate_is_one_row(self) -> None:
        figure = plot.latent_grid(linear_decoder(1, 4), 1, (2, 2), grid_size=5)
        assert figure.axes[0].images[0].get_array().shape == (2, 10)

    def test_wrong_shape_names_both_numbers(self) -> None:
        with pytest.raises(InvalidInput, match=r"64 features .* \(28, 28\), which has 784"):
            plot.latent_grid(linear_decoder(2, 64), 2, (28, 28))

    def test_ticks_leave_room_for_their_labels(self) -> None:
        axes = plot.latent_grid(linear_decoder(2, 4), 2, (2, 2), grid_size=30).axes[0]
        assert len(axes.get_xticks()) == len(axes.get_yticks()) == 10

    @pytest.mark.parametrize(("lone", "extend"), [(0.5, "neither"), (-9.0, "min"), (9.0, "max")])
    def test_an_arrow_says_where_values_lie_beyond_the_colours(self, lone: float, extend: str) -> None:
        def decode(z: np.ndarray) -> np.ndarray:
            rows = np.repeat(np.linspace(0, 1, len(z))[:, None], 4, axis=1)
            rows[len(z) // 2] = lone
            return rows

        image = plot.latent_grid(decode, 2, (2, 2), grid_size=20).axes[0].images[0]
        assert image.colorbar.extend == extend
        assert image.get_clim() == pytest.approx((0, 1), abs=0.02)

    @pytest.mark.parametrize("ends", [(4.0, -4.0), (1.0, 1.0), (4.0,)])
    @pytest.mark.parametrize("name", ["xy_range", "clip"])
    def test_what_is_no_range_is_refused(self, name: str, ends: Any) -> None:
        with pytest.raises(InvalidInput, match=f"{name}=.* is no range"):
            plot.latent_grid(linear_decoder(2, 4), 2, (2, 2), **{name: ends})

    def test_empty_grid_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="grid_size is 0"):
            plot.latent_grid(linear_decoder(2, 4), 2, (2, 2), grid_size=0)


@pytest.mark.parametrize(
    ("item_shape", "shape"),
    [
        ((8, 6), (8, 6)),
        ((8, 6, 1), (8, 6)),
        ((1, 8, 6), (8, 6)),
        ((8, 6, 3), (8, 6, 3)),
        ((3, 8, 6), (8, 6, 3)),
    ],
)
def test_image_shapes(item_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    rows = np.arange(2 * np.prod(item_shape), dtype=np.float32).reshape(2, -1)
    images = as_images(rows, item_shape)
    assert images is not None
    assert images.shape == (2, *shape)
    if item_shape == (3, 8, 6):
        np.testing.assert_array_equal(images[0, 2, 3], rows[0].reshape(item_shape)[:, 2, 3])


@pytest.mark.parametrize("item_shape", [(64,), (1, 64), (64, 1), (4, 4, 4), (2, 2, 2, 8)])
def test_other_shapes_are_no_images(item_shape: tuple[int, ...]) -> None:
    assert as_images(np.zeros((2, 64)), item_shape) is None


class TestRows:
    def test_tiles_run_right_then_down_and_the_rest_is_blank(self) -> None:
        rows = np.repeat(np.arange(5.0)[:, None], 12, axis=1)
        (axes,) = plot.row_tiles(rows, (3, 4), n_columns=3, title="five").axes
        canvas = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_array_equal(canvas[::3, ::4], [[0, 1, 2], [3, 4, np.nan]])
        assert canvas.shape == (6, 12)
        assert axes.get_title() == "five"

    def test_few_rows_fill_the_width(self) -> None:
        (axes,) = plot.row_tiles(np.zeros((2, 4)), (2, 2)).axes
        assert axes.images[0].get_array().shape == (2, 4)

    def test_rows_that_are_no_images_become_lines(self, tmp_path: Path) -> None:
        figure = plot.row_tiles(RNG.normal(size=(3, 30)), (30,), n_columns=2)
        assert not figure.axes[0].images
        plot.write_figure(figure, str(tmp_path / "rows.png"))

    def test_colours(self, tmp_path: Path) -> None:
        figure = plot.row_tiles(RNG.normal(size=(3, 48)), (4, 4, 3), n_columns=2)
        plot.write_figure(figure, str(tmp_path / "rows.png"))
        assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)

    @pytest.mark.parametrize(("shape", "n_columns"), [((0, 4), 1), ((4,), 1), ((2, 4), 0)])
    def test_nothing_to_draw_is_refused(self, shape: tuple[int, ...], n_columns: int) -> None:
        with pytest.raises(InvalidInput, match="cannot be drawn"):
            plot.row_tiles(np.zeros(shape), (2, 2), n_columns=n_columns)

    def test_wrong_shape_names_both_numbers(self) -> None:
        with pytest.raises(
            InvalidInput, match=r"rows of 64 features cannot be drawn in the shape \(8, 9\), which has 72"
        ):
            plot.row_tiles(np.zeros((3, 64)), (8, 9))


class TestReconstructions:
    def test_originals_are_above(self) -> None:
        above, below = np.zeros((3, 16)), np.ones((3, 16))
        figure = plot.compare_rows(above, below, (4, 4), names=["a", "b", "c"], names_are="id")
        axes = figure.axes[0]
        canvas = axes.images[0].get_array()
        assert axes.images[0].get_clim() == (0, 1)
        assert canvas.shape == (8, 12)
        assert canvas[:4].max() == 0
        assert canvas[4:].min() == 1
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["original", "reconstruction"]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "c"]
        assert axes.get_xlabel() == "id"
        assert "error of these rows 1)" in axes.get_title()

    def test_tiles_are_not_transposed(self) -> None:
        rows = np.arange(12.0).reshape(1, 12)
        image = plot.compare_rows(rows, rows, (3, 4)).axes[0].images[0].get_array()
        np.testing.assert_array_equal(image[:3], rows.reshape(3, 4))

    def test_unequal_shapes_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match=r"\(3, 16\) and reconstructions \(2, 16\)"):
            plot.compare_rows(np.zeros((3, 16)), np.zeros((2, 16)), (4, 4))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_written_whole_into_a_new_directory(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "new" / f"picture.{suffix}"
    plot.write_figure(plot.scatter_latents(RNG.normal(size=(9, 2))), str(target))
    assert target.stat().st_size > 1000
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_picture_is_reproducible(tmp_path: Path) -> None:
    z = RNG.normal(size=(99, 2))
    for name in ("a.png", "b.png"):
        plot.write_figure(plot.scatter_latents(z, ["x", "y", "z"] * 33), str(tmp_path / name))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["picture.docx", "picture"])
def test_unknown_suffix_names_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"must end in one of .*png"):
        plot.write_figure(plot.scatter_latents(np.zeros((2, 2))), str(tmp_path / name))
    assert not any(tmp_path.iterdir())


def test_every_suffix_that_is_named_can_be_written(tmp_path: Path) -> None:
    figure = plot.scatter_latents(np.zeros((2, 2)))
    figure.set_size_inches(1, 1)
    with pytest.raises(InvalidInput) as refusal:
        plot.write_figure(figure, str(tmp_path / "picture"))
    for suffix in str(refusal.value).partition("one of ")[2].split(", "):
        plot.write_figure(figure, str(tmp_path / f"picture.{suffix}"))


def test_missing_library_ends_in_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(MissingExtra, match=r"matplotlib.*pip install 'cvae-dist\[plot\]'$"):
        plot.scatter_latents(np.zeros((2, 2)))


def test_neither_pyplot_nor_torch_nor_dask_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\nfrom cvae_dist import plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot.write_figure(plot.scatter_latents(np.eye(2)), {str(tmp_path / 'p.png')!r})\n"
        "print([name for name in ('matplotlib.pyplot', 'torch', 'dask') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real stores and a real model."""
    from cvae_dist.estimator import CompressionVAE
    from cvae_dist.verbs.decode import decode
    from cvae_dist.verbs.embed import embed
    from cvae_dist.verbs.ingest import ingest

    folder = tmp_path_factory.mktemp("made")
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images[:120], digits.target, strict=False)):
        (folder / "tree" / str(digit)).mkdir(parents=True, exist_ok=True)
        np.save(folder / "tree" / str(digit) / f"{number}.npy", image)
    rows, latents, model = (str(folder / name) for name in ("rows.zarr", "latents.zarr", "model"))
    ingest(str(folder / "tree"), rows, rows_per_file="one", label="folder")
    CompressionVAE(rows, logdir=model, num_steps=20, cells_encoder=(16,)).train()
    embed(rows, model, latents)
    decode(latents, model, str(folder / "reconstructions.zarr"))
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is written."""
    seen: list[Any] = []
    write = plot.write_figure
    monkeypatch.setattr(verbs, "write_figure", lambda figure, *rest: seen.append(figure) or write(figure, *rest))
    return seen


class TestVerbs:
    def test_latents(self, made: Path, figures: list[Any]) -> None:
        events: list[Any] = []
        verbs.plot_latents(str(made / "latents.zarr"), str(made / "latents.png"), on_event=events.append)
        assert legend(figures[0].axes[0]) == [str(digit) for digit in range(10)]
        assert len(figures[0].axes[0].collections[0].get_offsets()) == 120
        assert (made / "latents.png").stat().st_size > 10_000
        assert [(event.stage, event.kind) for event in events] == [("plot latents", "done")]

    def test_latents_without_labels(self, made: Path, figures: list[Any]) -> None:
        verbs.plot_latents(str(made / "latents.zarr"), str(made / "plain.png"), label=None)
        assert figures[0].axes[0].get_legend() is None

    def test_latents_with_too_many_classes(self, made: Path, figures: list[Any]) -> None:
        verbs.plot_latents(str(made / "latents.zarr"), str(made / "ids.png"), label="id")
        assert legend(figures[0].axes[0])[-1] == "other (101 classes)"

    def test_unknown_column_names_the_known(self, made: Path) -> None:
        with pytest.raises(InvalidInput, match=r"no column 'colour'.*id, label"):
            verbs.plot_latents(str(made / "latents.zarr"), str(made / "no.png"), label="colour")
        assert not (made / "no.png").exists()

    def test_of_many_rows_evenly_spread_chunks_are_drawn(
        self, made: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verbs, "MAX_POINTS", 50)
        ranges = verbs._spread(1000, 10)
        assert len(ranges) == 5
        assert ranges[0] == (0, 10)
        assert ranges[-1] == (990, 1000)
        monkeypatch.setattr(verbs, "_spread", lambda *_: [(0, 20), (60, 90)])
        verbs.plot_latents(str(made / "latents.zarr"), str(made / "some.png"))
        title = figures[0].axes[0].get_title()
        assert title.splitlines()[0] == "50 of 120 rows in 2 latent dimensions"
        assert title.splitlines()[1] == "(70 left out to draw fewer)"

    def test_grid(self, made: Path, figures: list[Any]) -> None:
        verbs.plot_grid(str(made / "model"), str(made / "grid.png"), grid_size=4)
        assert figures[0].axes[0].images[0].get_array().shape == (32, 32)

    def test_loss(self, made: Path, figures: list[Any]) -> None:
        verbs.plot_loss(str(made / "model"), str(made / "loss.png"))
        assert len(figures[0].axes) == 3

    def test_reconstructions(self, made: Path, figures: list[Any]) -> None:
        rows, back = str(made / "rows.zarr"), str(made / "reconstructions.zarr")
        verbs.plot_reconstructions(rows, back, str(made / "reconstructions.png"), n=5)
        axes = figures[0].axes[0]
        assert axes.images[0].get_array().shape == (16, 40)
        assert [tick.get_text() for tick in axes.get_xticklabels()][0] == "0\n0"
        assert axes.get_xlabel() == "row and its label"

    @pytest.mark.parametrize("n", [0, -3])
    def test_no_rows_asked_for(self, made: Path, n: int) -> None:
        rows, back = str(made / "rows.zarr"), str(made / "reconstructions.zarr")
        with pytest.raises(InvalidInput, match=f"{n} rows of .*120 rows"):
            verbs.plot_reconstructions(rows, back, str(made / "no.png"), n=n)

    def test_missing_store(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFound):
            verbs.plot_latents(str(tmp_path / "none.zarr"), str(tmp_path / "p.png"))
        with pytest.raises(SourceNotFound):
            verbs.plot_grid(str(tmp_path / "none"), str(tmp_path / "p.png"))


def test_strings_of_variable_width_are_classes() -> None:
    classes = classify(np.array(["b", "a", "b"], dtype=np.dtypes.StringDType()))
    assert isinstance(classes, Classes)
    assert classes.names == ("a", "b")


def test_no_history_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="train the model first"):
        verbs.plot_loss(str(tmp_path), str(tmp_path / "loss.png"))


@pytest.fixture(scope="module")
def kinds(made: Path) -> dict[str, str]:
    from cvae_dist.verbs.score import score

    names = {"rows": "rows.zarr", "latents": "latents.zarr", "model": "model", "decoded": "reconstructions.zarr"}
    kinds = {kind: str(made / name) for kind, name in names.items()}
    return {**kinds, "scores": score(kinds["rows"], kinds["model"], made / "scores.zarr").url}


@pytest.fixture(scope="module")
def model(made: Path) -> Any:
    from cvae_dist.estimator import CompressionVAE

    return CompressionVAE(logdir=made / "model")


class TestFlags:
    """The look of pictures from the command line."""

    @pytest.mark.parametrize(
        ("words", "flags"),
        [
            (["latents", "latents.zarr"], ["--size", "7", "--alpha", "0.5", "--cmap", "tab10"]),
            (["grid", "model"], ["--cmap", "magma"]),
            (["loss", "model"], []),
            (["reconstructions", "rows.zarr", "reconstructions.zarr"], ["--cmap", "magma"]),
        ],
    )
    def test_reach_the_picture(
        self, made: Path, figures: list[Any], monkeypatch: pytest.MonkeyPatch, words: list[str], flags: list[str]
    ) -> None:
        monkeypatch.chdir(made)
        assert main(["plot", *words, "flags.png", "--title", "Mine", *flags]) == 0
        axes = figures[0].axes[0]
        assert "Mine" in (axes.get_title(), figures[0].get_suptitle())
        if words[0] == "latents":
            points = axes.collections[0]
            assert (points.get_sizes().tolist(), points.get_alpha()) == ([7], 0.5)
        elif flags:
            assert axes.images[0].get_cmap().name == "magma"

    def test_a_bad_value_is_one_clear_error(
        self, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(made)
        assert main(["plot", "latents", "latents.zarr", "bad.png", "--alpha", "2"]) == 1
        assert (
            capsys.readouterr().err == "cvae-dist: alpha=2.0 cannot be drawn: give one number above 0 and at most 1\n"
        )
        assert not (made / "bad.png").exists()


class TestKinds:
    """Stores and models that a picture is not made of."""

    @pytest.mark.parametrize(
        ("verb", "given", "message"),
        [
            (verbs.plot_latents, ["rows"], "rows.zarr holds rows, but latents are needed.*cvae-dist embed STORE MODEL"),
            (verbs.plot_latents, ["scores"], "holds scores, but latents are needed.*cvae-dist embed STORE MODEL"),
            (verbs.plot_latents, ["model"], "is the directory of a model.*embed STORE MODEL LATENTS"),
            (verbs.plot_loss, ["rows"], "is a store, not the directory of a model.*cvae-dist train STORE MODEL"),
            (verbs.plot_reconstructions, ["latents", "decoded"], "holds latents, but rows are needed.*ingest SOURCE"),
            (verbs.plot_reconstructions, ["rows", "latents"], "holds latents that were not decoded.*decode LATENTS"),
            (verbs.plot_reconstructions, ["rows", "scores"], "holds scores that were not decoded.*decode LATENTS"),
            (verbs.plot_reconstructions, ["decoded", "rows"], "holds rows that were not decoded.*rows first"),
            (verbs.plot_reconstructions, ["rows", "model"], "is the directory of a model"),
        ],
    )
    def test_are_refused(
        self, kinds: dict[str, str], tmp_path: Path, verb: Any, given: list[str], message: str
    ) -> None:
        with pytest.raises(InvalidInput, match=message):
            verb(*(kinds[kind] for kind in given), str(tmp_path / "picture.png"))
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["rows", "latents"])
    def test_the_grid_of_a_store_is_refused(self, kinds: dict[str, str], tmp_path: Path, kind: str) -> None:
        with pytest.raises(SourceNotFound, match="is a store, not a model.*train STORE MODEL"):
            verbs.plot_grid(kinds[kind], str(tmp_path / "picture.png"))


class TestEstimator:
    """The look of an estimator's pictures, and the shapes of what it draws."""

    @pytest.mark.parametrize(
        "name", ["visualize", "visualize_latent_grid", "visualize_reconstructions", "visualize_rows"]
    )
    def test_axes_title_and_colours(self, model: Any, name: str) -> None:
        figure = Figure(layout="constrained")
        _, axes = figure.subplots(1, 2)
        images = load_digits().images[:30]
        given = {"visualize": [Z, Z[:, 0]], "visualize_latent_grid": []}.get(name, [images])
        assert getattr(model, name)(*given, ax=axes, title="Mine", cmap="magma") is figure
        assert axes.get_title() == "Mine"
        assert [*axes.images, *axes.collections][0].get_cmap().name == "magma"

    def test_size_and_alpha(self, model: Any) -> None:
        points = model.visualize(Z, size=7, alpha=0.25).axes[0].collections[0]
        assert (points.get_sizes().tolist(), points.get_alpha()) == ([7], 0.25)
        with pytest.raises(InvalidInput, match="alpha=2 cannot be drawn"):
            model.visualize(Z, alpha=2)

    @pytest.mark.parametrize(
        ("shape", "canvas"),
        [
            ((64,), (16, 80)),
            ((8, 8), (16, 80)),
            ((8, 8, 1), (16, 80)),
            ((4, 5), (8, 50)),
            ((4, 5, 3), (8, 50, 3)),
        ],
    )
    def test_rows_have_their_own_shape_or_that_of_the_model(
        self, model: Any, shape: tuple[int, ...], canvas: tuple[int, ...]
    ) -> None:
        items = RNG.random((20, *shape))
        assert model.visualize_rows(items).axes[0].images[0].get_array().shape == canvas

    def test_vectors_of_another_length_are_refused(self, model: Any) -> None:
        with pytest.raises(InvalidInput, match=r"63 features cannot be drawn in the shape \(8, 8\)"):
            model.visualize_rows(np.zeros((3, 63)))

    def test_reconstructions_without_a_label_say_so(self, model: Any) -> None:
        labels = [None, *"abcdefghij"[:9], *[np.nan] * 10]
        axes = model.visualize_reconstructions(load_digits().images[:20], labels, n=2).axes[0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["no label", "no label"]
        assert axes.get_title().startswith("2 of 20 rows")


class TestLoss:
    HISTORY = [
        {"step": step, "loss": 1e6 if step == 10 else 100.0 / step, "kl": 1.0, "reconstruction": 2.0}
        | {"validation_loss": 7.0 - (step == 500), "validation_kl": 1.0, "validation_reconstruction": 2.0}
        for step in range(10, 1001, 10)
    ]

    def test_panels_and_best(self) -> None:
        figure = plot.loss_curves(self.HISTORY)
        first, *others = figure.axes
        assert [axes.get_ylabel() for axes in figure.axes] == [
            "-ELBO (nats per row)",
            "reconstruction",
            "KL to the prior",
        ]
        assert legend(first) == ["training batches", "validation, averaged weights"]
        assert others[-1].get_xlabel() == "training step"
        assert figure.get_suptitle() == "Best validation -ELBO: 6 nats per row at step 500"

    def test_the_first_steps_do_not_decide_the_scale(self) -> None:
        assert plot.loss_curves(self.HISTORY).axes[0].get_ylim()[1] < 20

    def test_without_validation(self) -> None:
        figure = plot.loss_curves([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}])
        assert len(figure.axes) == 1
        assert "training -ELBO: 2.5" in figure.get_suptitle()

    @pytest.mark.parametrize("history", [[], [{"step": 5, "epoch": 0.1}]])
    def test_nothing_recorded(self, history: list[dict[str, float]]) -> None:
        with pytest.raises(InvalidInput, match="no loss yet"):
            plot.loss_curves(history)
