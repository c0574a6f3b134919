"""Spans of releases, as contracts tell them."""

from fxquant.engines.contract import Evidence, Release


def test_releases_have_numbers() -> None:
    told = {"engine": "x", "loads": "y", "evidence": Evidence.RUN, "reference": "z"}
    spans = {
        ("1.0", ""): "1.0 and later",
        ("", "2.1"): "up to 2.1",
        ("1.0", "1.0"): "1.0",
        ("1.0", "2.0"): "1.0 to 2.0",
    }
    assert {key: Release(first=key[0], last=key[1], **told).span for key in spans} == spans
