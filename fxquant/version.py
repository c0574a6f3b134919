"""The version of fxquant, below everything that writes it."""

__version__ = "0.1.0"
