"""What is said of a source: options that its files do not know, names that are taken, and what must stay the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cvae_dist.cluster import nonfinite
from cvae_dist.errors import InvalidInput, SettingsChanged
from cvae_dist.sources import BadFile, FileTable, formats
from cvae_dist.store import RowStore
from cvae_dist.verbs.ingest import ingest

ROWS = np.arange(12.0).reshape(4, 3)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree/a.npy", ROWS)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    "options", [{"columns": ("a", "b")}, {"id": "key"}, {"carry": ("url",)}, {"array": "x"}], ids=str
)
def test_options_that_files_do_not_know_are_refused(tree: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidInput, match=f"holds npy files, for which {next(iter(options))} has no meaning; known: rows_"
    ):
        ingest(tree, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["columns", "carry"])
def test_one_name_is_no_list(tree: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{name}='ab' is no list of names; say {name}=\['ab'\]"):
        ingest(tree, tmp_path / "s", **{name: "ab"})  # type: ignore[arg-type]


def test_another_array_is_not_appended(tmp_path: Path) -> None:
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/0.npz", train=ROWS, test=ROWS + 1)
    ingest(tmp_path / "npz", tmp_path / "s", array="train")
    np.savez(tmp_path / "npz/1.npz", train=ROWS, test=ROWS + 1)
    with pytest.raises(SettingsChanged, match="array_asked: 'train' there, 'test' asked for"):
        ingest(tmp_path / "npz", tmp_path / "s", array="test")
    assert ingest(tmp_path / "npz", tmp_path / "s", array="train").rows == 8


@pytest.mark.parametrize("name", ["journal", "publications", "score", "x", "no name"])
def test_columns_whose_names_are_taken(tmp_path: Path, name: str) -> None:
    pd.DataFrame({"a": [1.0, 2.0], name: ["p", "q"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InvalidInput, match=f"carried column {name!r} is"):
        ingest(tmp_path / "t.parquet", tmp_path / "s", carry=(name,))
    assert not (tmp_path / "s").exists()


def test_a_store_is_not_its_own_source(tree: Path, tmp_path: Path) -> None:
    ingest(tree, tmp_path / "s")
    with pytest.raises(InvalidInput, match="lies in the store"):
        ingest(tmp_path / "s", tmp_path / "s", format="zarr", overwrite=True)
    np.testing.assert_array_equal(RowStore.open(str(tmp_path / "s")).read("x"), ROWS)


@pytest.mark.parametrize("names", [("p0/img_emb_0", "p1/img_emb_0"), ("img_emb/img_emb_0", "text_emb/text_emb_0")])
def test_pairs_that_cannot_be_told_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / "laion" / name).parent.mkdir(parents=True)
        np.save(tmp_path / "laion" / f"{name}.npy", ROWS)
    pd.DataFrame({"caption": list("abcd")}).to_parquet(tmp_path / "laion/metadata_0.parquet")
    with pytest.raises(InvalidInput, match="same number, so pairs cannot be told apart"):
        ingest(tmp_path / "laion", tmp_path / "s", format="laion")


def test_one_stray_file_does_not_decide_for_all(tree: Path, tmp_path: Path) -> None:
    np.save(tree / "0.npy", ROWS[:, :2])
    np.save(tree / "b.npy", ROWS)
    with pytest.raises(InvalidInput, match=r"most files of .*tree differ from those that decide .*a\.npy has items"):
        ingest(tree, tmp_path / "s", bad="skip")


def test_overwrite_holds_though_a_file_turns_out_bad(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(tree, tmp_path / "s", nonfinite="drop")
    np.save(tree / "b.npy", ROWS + 50)
    real, failed = nonfinite._nonfinite_rows, []

    def once(scan: Any) -> Any:
        if not failed:
            failed.append(scan)
            raise BadFile("b.npy", "header", "is broken")
        return real(scan)

    monkeypatch.setattr(nonfinite, "_nonfinite_rows", once)
    result = ingest(tree, tmp_path / "s", nonfinite="drop", bad="skip", label="folder", overwrite=True)
    assert (result.rows, result.bad_files) == (4, 1)
    assert RowStore.open(str(tmp_path / "s")).columns == ("label",)


def test_a_source_is_listed_again_where_another_driver_published_meanwhile(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(tree, tmp_path / "s")
    real, listed = formats.find_files, []

    def slow(*arguments: Any) -> tuple[Any, FileTable]:
        found = real(*arguments)
        if not listed:
            listed.append(found)
            np.save(tree / "b.npy", ROWS + 50)
            ingest(tree, tmp_path / "s")  # another driver, while this one lists
        return found

    monkeypatch.setattr(formats, "find_files", slow)
    result = ingest(tree, tmp_path / "s", changed="rewrite")
    assert (result.rows, result.deleted, result.nothing_to_do) == (8, 0, True)


@pytest.mark.parametrize("kind", ["parquet", "dictionary", "csv"])
@pytest.mark.parametrize("options", [{}, {"shuffle": 1}], ids=["in order", "shuffled"])
def test_long_texts_are_part_of_the_plan_of_memory(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    planned = {}
    for length in (3, 2000):
        texts = pd.Series([letter * length for letter in "abc"] * 1000)
        frame = pd.DataFrame({"a": np.arange(3000.0), "b": 0.5, "t": texts, "n": np.arange(3000)})
        place = tmp_path / f"{length}.{'csv' if kind == 'csv' else 'parquet'}"
        if kind == "csv":
            frame.to_csv(place, index=False)
        else:
            frame.astype({"t": "category" if kind == "dictionary" else str}).to_parquet(place, index=False)
        said: list[str] = []
        ingest(
            place, tmp_path / f"{length}.zarr", columns=("a", "b"), carry=("t", "n"),
            on_event=lambda event, said=said: said.append(event.message) if event.kind == "start" else None, **options,
        )  # fmt: skip
        planned[length] = int(said[0].rsplit(", ", 1)[1].split(" MB")[0].replace(",", ""))
    assert planned[2000] - planned[3] == pytest.approx(6 * 3000 * 2000 / 1e6, abs=2)
