"""ONNX caches: what a graph keeps of the tokens so far, in which tensors."""

from enum import StrEnum


class OnnxCache(StrEnum):
    """Values of `--onnx-cache`, and of `cache` in the metadata of model.onnx. B rows, T tokens, H heads.

    latent    one tensor a layer, [B, T, kv_lora_rank + qk_rope_head_dim]
    halves    the two halves of the latent, key and value [B, 1, T, half]: what runtimes for decoders take
    expanded  keys [B, H, T, qk_nope_head_dim + qk_rope_head_dim] and values [B, H, T, v_head_dim] of all heads
    """

    LATENT = "latent"
    HALVES = "halves"
    EXPANDED = "expanded"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a layer, by the last part of their names."""
        return ("latent",) if self is OnnxCache.LATENT else ("key", "value")
