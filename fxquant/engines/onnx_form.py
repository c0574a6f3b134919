"""ONNX form: the choices with which a model.onnx is written, as its metadata record them."""

from dataclasses import dataclass

from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import DEFAULT, DEFAULT_LEVEL, AccuracyLevel, OnnxProfile, numerics


@dataclass(frozen=True)
class OnnxForm:
    """Choices of the user; the weight files are the same for all but the profile ort.

    profile         operators of quantized linears
    cache           what the graph keeps of the tokens so far
    last_logits     it has an input num_logits_to_keep
    inline          plain nodes in place of local functions
    accuracy_level  how operators of onnxruntime's own multiply, in a profile that has them
    """

    profile: OnnxProfile = DEFAULT
    cache: OnnxCache = OnnxCache.LATENT
    last_logits: bool = False
    inline: bool = False
    accuracy_level: AccuracyLevel = DEFAULT_LEVEL

    @property
    def numerics(self) -> str:
        """What is exact, what is not, and what a session must be told; `numerics` in the metadata."""
        return numerics(self.profile, self.accuracy_level)
