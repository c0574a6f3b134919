"""ONNX options: what a user says about the form of an ONNX graph."""

from dataclasses import dataclass

from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import DEFAULT_LEVEL, AccuracyLevel, OnnxProfile
from fxquant.engines.table import Target, onnx_targets
from fxquant.errors import FxquantError
from fxquant.inputs.choices import choice


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """None and False leave the default; all else is refused for a target that has no ONNX graph.

    onnx_profile         operators of quantized linears; None: qdq
    onnx_accuracy_level  how operators of the profile ort multiply: 0 by float activations, 4 by int8 ones; None: 4
    onnx_cache           what the graph keeps of the tokens so far; None: latent
    onnx_last_logits     it has an input num_logits_to_keep
    onnx_inline          plain nodes in place of local functions
    """

    onnx_profile: OnnxProfile | None = None
    onnx_accuracy_level: int | None = None
    onnx_cache: OnnxCache | None = None
    onnx_last_logits: bool = False
    onnx_inline: bool = False

    def form_for(self, target: Target) -> OnnxForm:
        """How an ONNX graph is written. Raises FxquantError for a choice that the target or the profile has not."""
        given = self._given()
        if given and target not in onnx_targets():
            remedy = f"Pass --target {' or '.join(onnx_targets())}."
            raise FxquantError(given[0], f"target {target} has no ONNX graph.", remedy)
        profile = choice("onnx_profile", self.onnx_profile or OnnxForm.profile, OnnxProfile)
        cache = choice("onnx_cache", self.onnx_cache or OnnxForm.cache, OnnxCache)
        return OnnxForm(profile, cache, self.onnx_last_logits, self.onnx_inline, self._level(profile))

    def _given(self) -> list[str]:
        named = {"profile": self.onnx_profile, "accuracy-level": self.onnx_accuracy_level, "cache": self.onnx_cache}
        given = [f"--onnx-{name} {value}" for name, value in named.items() if value is not None]
        flags = {"--onnx-last-logits": self.onnx_last_logits, "--inline": self.onnx_inline}
        return given + [name for name, value in flags.items() if value]

    def _level(self, profile: OnnxProfile) -> AccuracyLevel:
        level = self.onnx_accuracy_level
        if level is None:
            return DEFAULT_LEVEL
        place = f"--onnx-accuracy-level {level}"
        if not profile.contrib:
            fact = f"profile {profile} has no operators of onnxruntime's own, whose activations it is about."
            raise FxquantError(place, fact, f"Pass --onnx-profile {OnnxProfile.ORT} too, or leave it out.")
        if level not in list(AccuracyLevel):
            raise FxquantError(place, "not a level.", "Pass 0, for float activations, or 4, for int8 ones.")
        return AccuracyLevel(level)
