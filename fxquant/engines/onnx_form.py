"""ONNX form: the choices with which a model.onnx is written, as its metadata record them."""

from dataclasses import dataclass

from fxquant.engines.onnx_profile import DEFAULT, OnnxProfile


@dataclass(frozen=True)
class OnnxForm:
    """Choices of the user; the weight files are the same for all.

    profile  operators of quantized linears
    inline   plain nodes in place of local functions
    """

    profile: OnnxProfile = DEFAULT
    inline: bool = False

    @property
    def numerics(self) -> str:
        """What is exact, what is not, and what a session must be told; `numerics` in the metadata."""
        return self.profile.numerics
