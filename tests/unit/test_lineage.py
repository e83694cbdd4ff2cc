"""Lineage: versions, history and digests, never credentials."""

import re

import pytest

from cvae_dist.store.lineage import digest_json, history_line, versions, without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/tree", "/data/tree"),
        ("relative/a b", "relative/a b"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("s3://key:secret@bucket/prefix", "s3://bucket/prefix"),
        ("https://user@host/x?token=secret#part", "https://host/x"),
        ("https://u:p@s@host:8080/x", "https://host:8080/x"),
    ],
)
def test_credentials_are_left_out(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_versions_and_history() -> None:
    assert {"python", "cvae-dist", "numpy", "zarr"} <= set(versions())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ: cvae-dist \S+ ingest rows", history_line("ingest rows"))


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
    assert len(digest_json({})) == 32
