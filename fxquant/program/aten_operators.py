"""Aten operators that a graph may call: a closed list. Each is a deterministic function of its arguments.

An operator is not listed, and so refused by `compile` and by every reader of a graph file, if it writes into its
arguments, opens files, draws random numbers, reads a tensor's value, gives a shape that depends on values, or depends
on the layout in memory.
"""

FAMILIES: dict[str, str] = {
    "arithmetic": """
        add.Scalar add.Tensor sub.Scalar sub.Tensor rsub.Scalar rsub.Tensor subtract.Scalar subtract.Tensor
        mul.Scalar mul.Tensor multiply.Scalar multiply.Tensor div.Scalar div.Tensor div.Scalar_mode div.Tensor_mode
        divide.Scalar divide.Tensor true_divide.Scalar true_divide.Tensor floor_divide.default floor_divide.Scalar
        remainder.Scalar remainder.Tensor fmod.Scalar fmod.Tensor neg.default negative.default positive.default
        reciprocal.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor float_power.Scalar float_power.Tensor_Scalar
        float_power.Tensor_Tensor square.default sqrt.default rsqrt.default addcmul.default addcdiv.default lerp.Scalar
        lerp.Tensor maximum.default minimum.default fmax.default fmin.default max.other min.other hypot.default
        copysign.Scalar copysign.Tensor ldexp.Tensor frexp.Tensor
    """,
    "functions": """
        abs.default absolute.default sign.default sgn.default signbit.default exp.default exp2.default expm1.default
        log.default log2.default log10.default log1p.default logaddexp.default logaddexp2.default xlogy.Tensor
        sin.default cos.default tan.default asin.default acos.default atan.default atan2.default sinh.default
        cosh.default tanh.default asinh.default acosh.default atanh.default sinc.default erf.default erfc.default
        erfinv.default lgamma.default digamma.default floor.default ceil.default round.default round.decimals
        trunc.default fix.default frac.default clamp.default clamp.Tensor clamp_min.default clamp_min.Tensor
        clamp_max.default clamp_max.Tensor clip.default clip.Tensor nan_to_num.default logit.default
        special_expit.default special_xlogy.default deg2rad.default rad2deg.default
    """,
    "activations": """
        relu.default relu6.default sigmoid.default log_sigmoid.default silu.default gelu.default softplus.default
        softshrink.default hardshrink.default hardtanh.default hardsigmoid.default hardswish.default mish.default
        elu.default celu.default selu.default leaky_relu.default prelu.default glu.default threshold.default
        softmax.int log_softmax.int _softmax.default _log_softmax.default
    """,
    "reductions": """
        sum.default sum.dim_IntList mean.default mean.dim nansum.default nanmean.default prod.default prod.dim_int
        amax.default amin.default aminmax.default max.default max.dim min.default min.dim argmax.default argmin.default
        all.default all.dim all.dims any.default any.dim any.dims std.default std.dim std.correction var.default var.dim
        var.correction var_mean.correction std_mean.correction logsumexp.default norm.Scalar norm.ScalarOpt_dim
        norm.ScalarOpt_dim_dtype linalg_vector_norm.default cumsum.default cumprod.default cummax.default cummin.default
        logcumsumexp.default topk.default sort.default sort.stable argsort.default argsort.stable median.dim
        kthvalue.default trace.default diff.default
    """,
    "products": """
        matmul.default mm.default bmm.default mv.default dot.default inner.default outer.default addmm.default
        addmv.default addbmm.default baddbmm.default linear.default einsum.default tensordot.default cross.default
        kron.default scaled_dot_product_attention.default conv1d.default conv1d.padding
    """,
    "norms": """
        layer_norm.default native_layer_norm.default rms_norm.default group_norm.default native_group_norm.default
        cosine_similarity.default
    """,
    "comparison and logic": """
        eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar
        ge.Tensor not_equal.Scalar not_equal.Tensor less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor
        greater.Scalar greater.Tensor greater_equal.Scalar greater_equal.Tensor isnan.default isinf.default
        isfinite.default isposinf.default isneginf.default isclose.default isin.Tensor_Tensor isin.Tensor_Scalar
        logical_not.default logical_and.default logical_or.default logical_xor.default bitwise_not.default
        bitwise_and.Scalar bitwise_and.Tensor bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor
        bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor
        bitwise_right_shift.Tensor_Scalar __and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar
        __xor__.Tensor __lshift__.Scalar __lshift__.Tensor __rshift__.Scalar __rshift__.Tensor where.self where.Scalar
        where.ScalarOther where.ScalarSelf masked_fill.Scalar masked_fill.Tensor heaviside.default
    """,
    "making tensors": """
        full.default ones.default zeros.default empty.memory_format empty_permuted.default arange.default arange.start
        arange.start_step linspace.default eye.default eye.m scalar_tensor.default full_like.default ones_like.default
        zeros_like.default empty_like.default new_full.default new_ones.default new_zeros.default new_empty.default
        tril.default triu.default one_hot.default fill.Scalar fill.Tensor copy.default zero.default
    """,
    "dtype": """
        to.dtype to.dtype_layout to.other type_as.default _to_copy.default view.dtype complex.default real.default
        imag.default polar.default conj.default _conj.default resolve_conj.default view_as_complex.default
        view_as_real.default
    """,
    "shape": """
        view.default _unsafe_view.default view_as.default reshape.default reshape_as.default flatten.using_ints
        unflatten.int ravel.default permute.default transpose.int t.default numpy_T.default mT.default swapaxes.default
        swapdims.default movedim.int movedim.intlist moveaxis.int moveaxis.intlist squeeze.default squeeze.dim
        squeeze.dims unsqueeze.default expand.default expand_as.default broadcast_to.default broadcast_tensors.default
        repeat.default tile.default repeat_interleave.self_int slice.Tensor select.int narrow.default diagonal.default
        diag.default diag_embed.default split.Tensor split.sizes split_with_sizes.default unsafe_split.Tensor
        unsafe_split_with_sizes.default chunk.default unsafe_chunk.default tensor_split.sections unbind.int cat.default
        concat.default concatenate.default stack.default hstack.default vstack.default meshgrid.default
        meshgrid.indexing flip.default roll.default rot90.default unfold.default pad.default constant_pad_nd.default
        atleast_1d.default atleast_2d.default atleast_3d.default clone.default contiguous.default alias.default
        detach.default lift_fresh_copy.default sym_size.int sym_numel.default
    """,
    "lookup": """
        embedding.default index_select.default gather.default index.Tensor _unsafe_index.Tensor take.default
        take_along_dim.default index_put.default index_add.default index_copy.default index_fill.int_Scalar
        index_fill.int_Tensor scatter.src scatter.value scatter_add.default scatter_reduce.two slice_scatter.default
        select_scatter.default diagonal_scatter.default searchsorted.Tensor searchsorted.Scalar bucketize.Tensor
        bucketize.Scalar
    """,
}
"""Family → `<name>.<overload>` of its operators."""

ATEN: tuple[str, ...] = tuple(f"aten::{name}" for text in FAMILIES.values() for name in text.split())
