"""Layers that the blocks of every stage share. Maps are (B, H, W, C); parameters are float32."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.ops.layers import activation, depthwise, normalization
from dat_jax.ops.layers import linear as linear_ops
from dat_jax.ops.layers import mlp as mlp_ops

_STATISTICS_RATE = 0.1  # of BatchNorm, PyTorch's momentum


def uniform_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): what the published models start from, weights and biases alike."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def table_init(std: float) -> nn.initializers.Initializer:
    """Normal of this standard deviation. Published as truncated at -2 and 2, which is 100 deviations away or more."""
    return nn.initializers.normal(std)


class Linear(nn.Module):
    """nn.Dense by ``ops.layers.linear``, with the published initialisation."""

    features: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        init = uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        if not self.use_bias:
            x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
            return x @ kernel
        bias = self.param("bias", init, (self.features,))
        return linear_ops.linear(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


def conv(
    features: int,
    in_features: int,
    *,
    kernel_size: int,
    stride: int,
    padding: int,
    name: str,
    dtype: Any,
    use_bias: bool = True,
) -> nn.Conv:
    """nn.Conv, square, with the published initialisation."""
    init = uniform_init(in_features * kernel_size**2)
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        name=name,
    )


class LayerNorm(nn.Module):
    """LayerNorm over channels, eps 1e-5, statistics in float32 or better."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return normalization.layer_norm(x.astype(self.dtype), scale, bias, 1e-5)


class GeluLinear(nn.Module):
    """GELU, then a linear layer; parameters are those of ``Linear``."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        init = uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return activation.gelu_linear(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias, zero padding ``padding`` (kernel_size // 2 unless given).

    ``groups`` consecutive runs of channels share their kernels and biases, which have as many channels as one run.
    """

    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x):
        init = uniform_init(self.kernel_size**2)
        channels = x.shape[-1] // self.groups
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, 1, channels))
        bias = self.param("bias", init, (channels,))
        kernel, bias = jnp.tile(kernel, self.groups), jnp.tile(bias, self.groups)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = depthwise.depthwise_conv(
            x,
            kernel,
            stride=self.stride,
            padding=self.kernel_size // 2 if self.padding is None else self.padding,
            implementation=self.implementation,
        )
        return out + bias.reshape(1, 1, 1, -1)


class DropPath(nn.Module):
    """Drops the branch of an example with probability ``rate``, scales what stays by 1 / (1 - rate).

    ``rate`` may be traced. Random stream: "dropout". Source: Deep Networks with Stochastic Depth (1603.09382).
    """

    @nn.compact
    def __call__(self, x, rate: float | jax.Array, *, train: bool):
        if not train or (isinstance(rate, float) and rate == 0):
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


class BatchNorm(nn.Module):
    """BatchNorm over all but the channels, eps 1e-5, statistics in float32 or better; training moves them by a tenth.

    The batch is the whole one, over all devices (the partitioner adds the sums), as PyTorch's SyncBatchNorm; as there the
    variance that is kept is n / (n - 1) of the batch's. With ``mask``, bool (B,), only those rows count. Collection
    "batch_stats": mean and var.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool, mask: jax.Array | None = None):
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        kept_var = self.variable("batch_stats", "var", jnp.ones, channels)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            axes = tuple(range(x.ndim - 1))
            counted, count = None, x.size // x.shape[-1]
            if mask is not None:
                counted = mask.reshape(-1, *(1,) * (x.ndim - 1))
                count = jnp.maximum(mask.sum() * (count // x.shape[0]), 1)
            mean = wide.sum(axes, where=counted) / count
            square = jnp.square(wide - mean.reshape((1,) * len(axes) + channels))
            var = square.sum(axes, where=counted) / count
            if not self.is_initializing():
                kept_mean.value += _STATISTICS_RATE * (mean - kept_mean.value)
                kept_var.value += _STATISTICS_RATE * (var * count / jnp.maximum(count - 1, 1) - kept_var.value)
        else:
            mean, var = kept_mean.value, kept_var.value
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        shape = (1,) * (x.ndim - 1) + channels
        return (wide * factor.reshape(shape) + (bias - mean * factor).reshape(shape)).astype(self.dtype)


class ConvUnit(nn.Module):
    """Square convolution without bias that keeps the size, BatchNorm (see there), ReLU: the unit of the published heads."""

    features: int
    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool, mask: jax.Array | None = None):
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        sides, padding = (self.kernel_size,) * 2, self.kernel_size // 2
        x = nn.Conv(
            self.features, sides, padding=padding, use_bias=False, kernel_init=init, dtype=self.dtype, name="conv"
        )(x)
        return nn.relu(BatchNorm(dtype=self.dtype, name="bn")(x, train=train, mask=mask))


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor. Source: CaiT (2103.17239)."""

    initial_value: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.constant(self.initial_value), (x.shape[-1],))
        return x * scale.astype(self.dtype).reshape(1, 1, 1, -1)


class Affine(nn.Module):
    """Kernel and bias of a layer, named and initialised as those of ``Linear`` and ``DepthwiseConv``."""

    kernel_shape: tuple[int, ...]
    fan_in: int

    @nn.compact
    def __call__(self):
        init = uniform_init(self.fan_in)
        return self.param("kernel", init, self.kernel_shape), self.param("bias", init, self.kernel_shape[-1:])


class Mlp(nn.Module):
    """Linear, (a depthwise 3 x 3 convolution added,) GELU, linear; ``expansion`` times as wide inside."""

    expansion: int = 4
    depthwise: bool = False
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x):
        channels, hidden = x.shape[-1], self.expansion * x.shape[-1]
        if self.depthwise and mlp_ops.chooses_kernel(x.shape, hidden, self.implementation):
            linear1 = Affine((channels, hidden), channels, name="linear1")()
            convolution = Affine((3, 3, 1, hidden), 9, name="dwc")()
            linear2 = Affine((hidden, channels), hidden, name="linear2")()
            x = x.astype(self.dtype)
            return mlp_ops.conv_mlp(x, *linear1, *convolution, *linear2, implementation=self.implementation)
        x = Linear(hidden, name="linear1", dtype=self.dtype)(x)
        if self.depthwise:
            x = x + DepthwiseConv(dtype=self.dtype, implementation=self.implementation, name="dwc")(x)
        return GeluLinear(channels, dtype=self.dtype, name="linear2")(x)
