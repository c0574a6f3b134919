"""What each engine loads: contracts as data, and the check of recipes against them."""

from fxquant.contracts.check import Finding, Linear, check, refusal
from fxquant.contracts.contract import Contract, Verdict, load_contract

__all__ = ["Contract", "Finding", "Linear", "Verdict", "check", "load_contract", "refusal"]
