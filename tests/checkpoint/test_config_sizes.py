"""Sizes of a config: each has a limit that its error says; whatever a config says, it is read or refused at once."""

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import YARN, tiny_config

from fxquant.checkpoint.config import DeepseekV3Config, _parameters, parse_config
from fxquant.errors import FxquantError
from fxquant.frontend.deepseek_args import hf_to_model_args
from fxquant.frontend.source import open_source
from fxquant.inputs import limits
from fxquant.models import rotary

INSIDES = ("Input should", "Extra inputs", "pydantic", "function-", "literal[", "int_")


def parse(**changes: Any) -> DeepseekV3Config:
    return parse_config(tiny_config(**changes), "config.json")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"hidden_size": 2**63}, "hidden_size: 9223372036854775808 is more than 4,194,304"),
        ({"hidden_size": -7}, "hidden_size: -7 is not greater than 0"),
        ({"hidden_size": True}, "hidden_size: true, not an integer"),
        ({"hidden_size": 256.0}, "hidden_size: 256.0, not an integer"),
        ({"hidden_size": "256"}, "hidden_size: '256', not an integer"),
        ({"hidden_size": None}, "hidden_size: empty, not an integer"),
        ({"hidden_size": [256]}, "hidden_size: a list, not an integer"),
        ({"vocab_size": 10**30}, f"vocab_size: {10**30} is more than"),
        ({"num_hidden_layers": 100_000}, f"num_hidden_layers: 100000 is more than {limits.LAYERS}"),
        ({"n_routed_experts": 1_000_000}, f"n_routed_experts: 1000000 is more than {limits.EXPERTS}"),
        ({"num_nextn_predict_layers": 10**9}, f"num_nextn_predict_layers: 1000000000 is more than {limits.MTP_LAYERS}"),
        ({"num_attention_heads": 10**6}, f"num_attention_heads: 1000000 is more than {limits.HEADS:,}"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace: -1 is less than 0"),
        ({"n_group": 0}, "n_group: 0 is not greater than 0"),
        ({"n_group": 3}, "n_routed_experts 8, n_group 3, topk_group 2: 8 experts do not form 3 groups"),
        ({"topk_group": 9}, "topk_group 9: 8 experts do not form 4 groups, 9 kept"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9: 9 experts per token do not fit into 2 groups"),
        ({"qk_rope_head_dim": 2**40}, "qk_rope_head_dim: "),
        ({"num_hidden_layers": 512, "n_routed_experts": 4096}, "n_routed_experts 4,096 in each of 511 layers are 2,09"),
        ({"hidden_size": 2**22, "moe_intermediate_size": 2**22, "num_hidden_layers": 9}, "parameters, at most 1e+15"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: nan, not a finite number"),
        ({"rope_theta": 1.0}, "rope_theta: 1.0 is not greater than 1"),
        ({"rope_theta": math.inf}, "rope_theta: inf, not a finite number"),
        ({"rope_theta": 10**39}, "rope_theta: "),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor: '2.5', not a number"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes', not true or false"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id.1: 'x', not an integer"),
        ({"rope_scaling": [1]}, "rope_scaling: a list, not a mapping"),
        ({"model_type": "x" * 10**6}, "model_type is 'xxx"),
        *(({"rope_scaling": YARN | {"beta_fast": beta}}, "beta_fast: ") for beta in (0, -1, 5e-324, math.nan, 1e99)),
        *(({"rope_scaling": YARN | {"beta_slow": beta}}, "scaling.beta_slow: ") for beta in (0, -1, math.inf)),
        *(({"rope_scaling": YARN | {"factor": factor}}, "scaling.factor: ") for factor in (0, -40, 1e300, math.nan)),
        *(({"rope_scaling": YARN | {"mscale": scale}}, "scaling.mscale: ") for scale in (-10, 1e9, math.nan)),
        ({"rope_scaling": YARN | {"mscale_all_dim": -3}}, "rope_scaling.mscale_all_dim: -3 is less than 0"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "max_position_embeddings: 0 is not"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1}, "rope_scaling": None}, "rope_parameters.factor: -1"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_size_that_is_none_is_named_with_its_limit(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(FxquantError) as caught:
        parse(**changes)
    assert fact in caught.value.fact, caught.value
    assert len(str(caught.value)) < 400 and not [word for word in INSIDES if word in str(caught.value)]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"dim": 2**63}, "dim: 9223372036854775808 is more than"),
        ({"n_layers": 100_000}, f"n_layers: 100000 is more than {limits.LAYERS}"),
        ({"n_routed_experts": 1_000_000}, "n_routed_experts: 1000000 is more than"),
        ({"n_heads": True}, "n_heads: true, not an integer"),
        ({"rope_factor": math.nan}, "rope_factor: nan, not a finite number"),
        ({"beta_fast": 0}, "beta_fast: 0 is less than 1e-06"),
        ({"mscale": math.inf}, "mscale: inf, not a finite number"),
        ({"n_activate_experts": 2}, "n_activate_experts: unknown key. Did you mean n_activated_experts?"),
    ],
)
def test_model_args_have_the_same_limits(tmp_path: Path, changes: dict[str, Any], fact: str) -> None:
    args = hf_to_model_args(parse())
    (tmp_path / "config.json").write_text(json.dumps(args | changes))
    with pytest.raises(FxquantError) as caught:
        open_source(tmp_path / "config.json", config_only=True)
    assert caught.value.place == str(tmp_path / "config.json") and fact in caught.value.fact, caught.value


def test_the_largest_models_are_far_from_the_limits() -> None:
    published = DeepseekV3Config()
    assert 6.5e11 < _parameters(published, 62, 59) < 7e11
    parse(num_hidden_layers=2 * 61, n_routed_experts=512, n_group=1, topk_group=1)
    parse(vocab_size=8 * 163840, hidden_size=8 * 7168, intermediate_size=8 * 18432, num_attention_heads=8 * 128)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**39), 10**39), st.integers(-2, 4096), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-1, 3), max_size=3), st.just({}), st.just(YARN),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 1e308, 5e-324, 1.0000000000000002, "yarn", "deepseek_v3", "bfloat16"]),
)  # fmt: skip
KEYS = sorted({*DeepseekV3Config.model_fields, "torch_dtype", "rope_parameters"} - {"model_type"})


@settings(max_examples=300)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    yarn=st.one_of(st.none(), st.dictionaries(st.sampled_from(sorted(YARN)), VALUES, max_size=3)),
)
def test_any_config_is_read_or_refused_at_once(changes: dict[str, Any], yarn: dict[str, Any] | None) -> None:
    given_config = tiny_config(**({} if yarn is None else {"rope_scaling": YARN | yarn}) | changes)
    before, start = copy.deepcopy(given_config), time.monotonic()
    try:
        config = parse_config(given_config, "config.json")
    except FxquantError as error:
        assert len(str(error)) < 1000 and not [word for word in INSIDES if word in str(error)]
    else:
        if config.qk_rope_head_dim < 10_000:
            factors = [*rotary.frequencies(config), rotary.attention_factor(config), config.softmax_scale]
            assert all(map(math.isfinite, factors))
    assert time.monotonic() - start < 1
    assert repr(given_config) == repr(before)
