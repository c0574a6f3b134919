"""Description and config.json keys that several engines have in common, from the rewritten program."""

from typing import TYPE_CHECKING

from fxquant.engines.engine import JsonObject
from fxquant.policy.kinds import Kind

if TYPE_CHECKING:
    from fxquant.program.program import Program
    from fxquant.schemes.schemes import Recipe

FORMAT_VERSION = "1.0.0"


def group_size(program: "Program") -> int:
    """The one group size of the int4 linears; 0 if they are per channel or there are none."""
    return max((recipe.group_size for recipe in program.recipes.values()), default=0)


def versioned_header(program: "Program") -> JsonObject:
    """Version, model type and group size, as vllm-ascend and SGLang expect them."""
    return {
        "version": FORMAT_VERSION,
        "model_quant_type": model_quant_type(program),
        "group_size": group_size(program),
    }


def model_quant_type(program: "Program") -> str:
    """Engines read it as the type of modules outside attention and experts; they decide the others per tensor."""
    from fxquant.schemes.schemes import Scheme

    return (Scheme.W8A8_DYNAMIC if program.recipes else Scheme.FLOAT).value


def scheme_keys(program: "Program") -> JsonObject:
    """`quantize`, and `mla_quantize`, `moe_quantize` if all linears of the kind have one scheme.

    `mtp_quantize` says that prediction layers are quantized, and how their experts are: attention is as `mla_quantize`.
    """
    from fxquant.schemes.schemes import Scheme

    keys = {"quantize": model_quant_type(program).lower()} if program.recipes else {}
    kinds = {Kind.ATTENTION: "mla_quantize", Kind.ROUTED_EXPERT: "moe_quantize"}
    for kind, key in kinds.items():
        keys |= _scheme_key(key, [recipe for recipe in program.recipes.values() if _kind(program, recipe) is kind])
    return keys | ({"mtp_quantize": Scheme.W8A8_DYNAMIC.value.lower()} if program.mtp.recipes else {})


def _scheme_key(key: str, recipes: "list[Recipe]") -> JsonObject:
    schemes = {recipe.scheme for recipe in recipes}
    return {key: schemes.pop().value.lower()} if len(schemes) == 1 else {}


def _kind(program: "Program", recipe: "Recipe") -> Kind:
    return program.parameters[recipe.weight_target].kind
