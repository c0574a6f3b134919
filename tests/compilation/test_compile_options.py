"""Options as text."""

import pytest

from fxquant import FxquantError
from fxquant.tools.compile_options import parse_size

SIZES = {"4GiB": 4 << 30, "500MB": 500_000_000, "1000000": 1_000_000, "1.5kB": 1500}


@pytest.mark.parametrize("text", SIZES)
def test_a_size(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "infGB", "1e400", "9" * 5000, "nan", "4 PB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(FxquantError, match="not a size"):
        parse_size(text)
