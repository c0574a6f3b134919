"""temporary"""

from fxquant.lowering.ascend.bounds import RULES, U, Value
from fxquant.lowering.ascend.bounds import _blocks as blocks
from fxquant.lowering.ascend.values import operands, producer
