"""Options as text, and by keyword."""

import pytest

from fxquant import CompileOptions, FxquantError
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.tools.compile_options import parse_cache, parse_profile, parse_size

SIZES = {"4GiB": 4 << 30, "500MB": 500_000_000, "1000000": 1_000_000, "1.5kB": 1500}


@pytest.mark.parametrize("text", SIZES)
def test_a_size(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "infGB", "1e400", "9" * 5000, "nan", "4 PB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(FxquantError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "tensorrt"}, {"target": "vllm_ascend"}, {"mtp": "x"}, {"tp": 0}, {"tp": "2"}, {"tp": True},
        {"samples": 0}, {"batch_size": 1.5}, {"workers": "dask"}, {"max_shard_size": -1},
    ],
)  # fmt: skip
def test_values_that_the_command_line_refuses(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(FxquantError, match=f"^{name}") as caught:
        CompileOptions(**wrong)
    assert "vllm_ascend" not in wrong.values() or "Did you mean vllm-ascend?" in str(caught.value)


def test_targets_by_name() -> None:
    assert CompileOptions(target="onnx", mtp="quant").target == Target.ONNX  # type: ignore[arg-type]


def test_a_profile_is_of_onnx_graphs_alone() -> None:
    assert CompileOptions(target=Target.ONNX).onnx_form().profile is OnnxProfile.QDQ
    assert (
        CompileOptions(target=Target.ONNX, onnx_profile=OnnxProfile.INTEGER).onnx_form().profile is OnnxProfile.INTEGER
    )
    with pytest.raises(FxquantError, match="--onnx-profile integer: target ascend has no ONNX graph"):
        CompileOptions(target=Target.ASCEND, onnx_profile=OnnxProfile.INTEGER)
    with pytest.raises(FxquantError, match="Did you mean integer"):
        parse_profile("intger")


def test_a_cache_and_last_logits_are_of_onnx_graphs_alone() -> None:
    form = CompileOptions(target=Target.ONNX, onnx_cache=OnnxCache.HALVES, onnx_last_logits=True).onnx_form()
    assert (form.cache, form.last_logits) == (OnnxCache.HALVES, True)
    with pytest.raises(FxquantError, match="--onnx-cache halves: target ascend has no ONNX graph"):
        CompileOptions(target=Target.ASCEND, onnx_cache=OnnxCache.HALVES)
    with pytest.raises(FxquantError, match="--onnx-last-logits: target ascend has no ONNX graph"):
        CompileOptions(target=Target.ASCEND, onnx_last_logits=True)
    with pytest.raises(FxquantError, match="Did you mean halves"):
        parse_cache("halfs")
