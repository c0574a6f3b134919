"""Verification: read an output back and check it against the source, the formulas and the graph."""

from fxquant.verification.foreign import verify_foreign
from fxquant.verification.rebuild import Rebuild
from fxquant.verification.report import Check, VerifyReport
from fxquant.verification.run import verify_output

__all__ = ["Check", "Rebuild", "VerifyReport", "verify_foreign", "verify_output"]
