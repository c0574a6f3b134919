"""Read back what was written and hold it against the source, the formulas and the graph."""

from fxquant.lowering.verify.rebuild import Rebuild
from fxquant.lowering.verify.report import Check, VerifyReport
from fxquant.lowering.verify.run import verify_output

__all__ = ["Check", "Rebuild", "VerifyReport", "verify_output"]
