"""Weight formats: how engines expect quantized weights on disk."""

from enum import StrEnum


class WeightFormat(StrEnum):
    """Their differences; docs/formats.md has every byte.

    PACKED       int4 packed, two output channels per byte, with `scale_bias`; two-level or per channel; float32 weight
                 scales
    UNPACKED     as PACKED, but one int4 code per byte and no `scale_bias`
    PER_CHANNEL  as PACKED, but per channel only; weight scales representable in the model's dtype, in which its engines
                 hold them; static parameters and biases in float32, and no weight scale for a static linear
    BLOCKS       as PACKED, but int4 as codes + 8, two neighbours along k per byte, and neither offsets nor
                 `scale_bias`: what ONNX Runtime's own operators read, which they take in blocks of k
    """

    PACKED = "packed"
    UNPACKED = "unpacked"
    PER_CHANNEL = "per_channel"
    BLOCKS = "blocks"

    @property
    def packed(self) -> bool:
        """Int4 with two output channels per byte, and `scale_bias` for the engines' nibble arithmetic."""
        return self in (WeightFormat.PACKED, WeightFormat.PER_CHANNEL)

    @property
    def offsets(self) -> bool:
        """Scales of weights have zero points beside them, all 0."""
        return self is not WeightFormat.BLOCKS

    @property
    def float32_parameters(self) -> bool:
        """Static parameters and biases are stored in float32, not in the model's dtype."""
        return self is WeightFormat.PER_CHANNEL

    @property
    def model_dtype_scales(self) -> bool:
        """Weight scales are rounded to the model's dtype before weights are divided by them."""
        return self is WeightFormat.PER_CHANNEL

    @property
    def static_weight_scale(self) -> bool:
        """A static linear has weight_scale and weight_offset too, although deq_scale holds all that engines need."""
        return self is not WeightFormat.PER_CHANNEL
