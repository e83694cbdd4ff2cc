"""What a caller may choose of a picture: axes, title, size, opacity, colours."""

from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cvae_dist import plot
from cvae_dist.errors import InvalidInput

Z = np.random.default_rng(0).normal(size=(300, 2))
IMAGES = np.random.default_rng(1).random((4, 12))


def pictures(**look: Any) -> dict[str, Any]:
    """Return every picture that is drawn in one set of axes."""
    return {
        "latents": lambda: plot.scatter_latents(Z, Z[:, 0], **look),
        "grid": lambda: plot.latent_grid(lambda z: np.repeat(z[:, :1], 12, axis=1), 2, (3, 4), **look),
        "rows": lambda: plot.row_tiles(IMAGES, (3, 4), **look),
        "reconstructions": lambda: plot.compare_rows(IMAGES, IMAGES, (3, 4), **look),
    }


PICTURES = list(pictures())


@pytest.mark.parametrize("name", PICTURES)
def test_given_axes_are_drawn_in(name: str) -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert pictures(ax=right, title="Mine")[name]() is figure
    assert right.get_title() == "Mine"
    assert right.collections or right.images
    assert not left.has_data()


@pytest.mark.parametrize("name", PICTURES)
def test_axes_of_a_part_of_a_figure(name: str) -> None:
    figure = Figure(layout="constrained")
    part, _ = figure.subfigures(1, 2)
    assert pictures(ax=part.subplots())[name]() is figure


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_no_axes_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"ax is of type ndarray.*one matplotlib Axes"):
        pictures(ax=Figure().subplots(1, 2))[name]()


@pytest.mark.parametrize("cmap", ["magma", matplotlib.colormaps["magma"]])
@pytest.mark.parametrize("name", PICTURES)
def test_colour_maps_by_name_and_as_they_are(name: str, cmap: Any) -> None:
    axes = pictures(cmap=cmap)[name]().axes[0]
    assert [*axes.images, *axes.collections][0].get_cmap().name == "magma"


@pytest.mark.parametrize("cmap", ["magmma", 3])
@pytest.mark.parametrize("name", PICTURES)
def test_an_unknown_colour_map_is_refused(name: str, cmap: Any) -> None:
    with pytest.raises(InvalidInput, match=f"cmap={cmap!r} is no colour map.*such as 'viridis'"):
        pictures(cmap=cmap)[name]()


def test_size_and_alpha_are_those_of_the_points() -> None:
    points = plot.scatter_latents(Z, size=7, alpha=0.25).axes[0].collections[0]
    assert points.get_sizes() == [7]
    assert points.get_alpha() == 0.25


def test_alpha_leaves_the_colour_bar_opaque() -> None:
    figure = plot.scatter_latents(Z, Z[:, 0], alpha=0.25)
    assert figure.axes[0].collections[0].get_alpha() == 0.25
    assert all((collection.get_facecolors()[:, 3] == 1).all() for collection in figure.axes[1].collections)


def test_who_asks_for_points_gets_no_density() -> None:
    z = np.random.default_rng(2).normal(size=(100_001, 2))
    assert len(plot.scatter_latents(z, size=1).axes[0].collections[0].get_offsets()) == 100_001


@pytest.mark.parametrize("name", ["size", "alpha"])
@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, "big", [3, 4]])
def test_what_cannot_be_drawn_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{name}=.* cannot be drawn: give one number above 0"):
        plot.scatter_latents(Z, **{name: value})


def test_alpha_is_at_most_one() -> None:
    with pytest.raises(InvalidInput, match="alpha=1.5 cannot be drawn.*at most 1"):
        plot.scatter_latents(Z, alpha=1.5)


@pytest.mark.parametrize("cmap", ["tab10", "viridis"])
def test_classes_take_colours_of_a_colour_map(cmap: str) -> None:
    axes = plot.scatter_latents(Z, np.arange(300) % 3, cmap=cmap).axes[0]
    scale = matplotlib.colormaps[cmap]
    expected = [scale(i) for i in range(3)] if cmap == "tab10" else [scale(i / 2) for i in range(3)]
    assert [line.get_color() for line in axes.get_legend().get_lines()] == [to_hex(colour) for colour in expected]


def test_a_colour_map_of_too_few_colours_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'tab10' has 10 colours for 12 classes"):
        plot.scatter_latents(Z, np.arange(300) % 12, cmap="tab10")
