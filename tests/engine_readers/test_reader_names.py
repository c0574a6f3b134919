"""Module paths as readers parse them."""

import pytest

from fxquant.engine_readers.names import part_of_layer


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("model.layers.3.self_attn.o_proj", "self_attn"),
        ("model.layers.61.mlp.shared_experts.down_proj", "mlp"),
        ("model.layers.61.eh_proj", "eh_proj"),
        ("model.layers.3.mlp.self_attn.o_proj", "mlp"),  # a name further down says nothing
        ("model.layers.x.self_attn.o_proj", ""),
        ("other.layers.3.self_attn.o_proj", ""),
        ("lm_head", ""),
        ("", ""),
    ],
)
def test_the_part_of_a_layer_is_by_its_place(module: str, part: str) -> None:
    assert part_of_layer(module) == part
