"""Layers that the blocks of all stages share. Maps are (B, H, W, C); parameters are float32.

Each module declares parameters and calls one function of ``dat_jax.ops.layers``. Algorithms for one platform are selected there,
by ``ops.dispatch``.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from dat_jax.ops.layers import local_perception as perception
from dat_jax.ops.layers.activation import gelu_linear
from dat_jax.ops.layers.depthwise import depthwise_conv
from dat_jax.ops.layers.linear import linear
from dat_jax.ops.layers.mlp import conv_mlp, uses_pallas
from dat_jax.ops.layers.normalization import layer_norm
from dat_jax.ops.sizes import clear

_STATISTICS_RATE = 0.1  # of BatchNorm's running averages, as PyTorch's momentum


def uniform_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), the published initialization of kernels and biases."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def table_init(std: float) -> nn.initializers.Initializer:
    """Normal with this standard deviation. Published as truncated at -2 and 2, which is at least 100 deviations away."""
    return nn.initializers.normal(std)


class Linear(nn.Module):
    """``nn.Dense`` with the published initialization.

    Attributes:
      features: output channels.
      dtype: of the computation.
      use_bias: whether to add a bias.
    """

    features: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        init = uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        if not self.use_bias:
            x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
            return x @ kernel
        bias = self.param("bias", init, (self.features,))
        return linear(*promote_dtype(x, kernel, bias, dtype=self.dtype))


class GeluLinear(nn.Module):
    """The exact GELU, then ``Linear`` with bias, as one op: the backward pass stores the input but not its GELU.

    Attributes:
      features: output channels.
      dtype: of the computation.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        init = uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return gelu_linear(*promote_dtype(x, kernel, bias, dtype=self.dtype))


class LayerNorm(nn.Module):
    """``nn.LayerNorm`` over channels with epsilon 1e-5 (``normalization.EPSILON``) and statistics in float32 or better.

    Attributes:
      dtype: of the input and the output.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x.astype(self.dtype), *_declare_scale_and_bias(self, x.shape[-1]))


class ScaleAndBias(nn.Module):
    """The parameters of a ``LayerNorm`` of some channels without its computation, with the same names and initialization.

    Attributes:
      channels: number of channels.
    """

    channels: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        return _declare_scale_and_bias(self, self.channels)


def _declare_scale_and_bias(module, channels):
    shape = (channels,)
    return module.param("scale", nn.initializers.ones, shape), module.param("bias", nn.initializers.zeros, shape)


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
    """``nn.Conv`` with a square kernel and the published initialization."""
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


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias and zero padding. ``sizes``: see ``ops.sizes``.

    Attributes:
      kernel_size: side of the square kernel.
      stride: step along both axes.
      padding: zeros on each side; None for kernel_size // 2.
      groups: number of consecutive runs of channels that share kernels and biases; these have the channels of one run.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.
    """

    kernel_size: int = 3
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x, sizes: jax.Array | None = None):
        x = clear(x, sizes)
        init = uniform_init(self.kernel_size**2)
        channels = x.shape[-1] // self.groups
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, 1, channels))
        bias = self.param("bias", init, (channels,))
        kernel, bias = jnp.tile(kernel, self.groups), jnp.tile(bias, self.groups)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        out = depthwise_conv(
            x,
            kernel,
            stride=self.stride,
            padding=self.kernel_size // 2 if self.padding is None else self.padding,
            implementation=self.implementation,
        )
        return out + bias.reshape(1, 1, 1, -1)


class DropPath(nn.Module):
    """Drops the branch of an example with probability ``rate`` and scales the others by 1 / (1 - rate).

    ``rate`` may be traced. Random stream: "dropout". Source: Deep Networks with Stochastic Depth (1603.09382).
    """

    @nn.compact
    def __call__(self, x, rate: float | jax.Array, *, train: bool):
        if not train or (isinstance(rate, float) and rate == 0):
            return x
        mask = self._sample(x.shape[0], rate).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(mask, x / jnp.asarray(1 - rate, x.dtype), 0)

    def factors(self, batch: int, rate: float | jax.Array, *, dtype: Any, train: bool) -> jax.Array:
        """Factors (B,), of ``dtype``, that the call multiplies the examples with: 0 or 1 / (1 - rate)."""
        if not train or (isinstance(rate, float) and rate == 0):
            return jnp.ones(batch, dtype)
        return jnp.where(self._sample(batch, rate), 1 / jnp.asarray(1 - rate, dtype), 0)

    def _sample(self, batch, rate):
        return jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (batch,))


class BatchNorm(nn.Module):
    """BatchNorm over all axes but the channels, epsilon 1e-5, statistics in float32 or better.

    In training the running averages move by a tenth of the difference. They are in collection "batch_stats": mean and var. As
    in PyTorch's SyncBatchNorm, and unlike ``nn.BatchNorm``:

    * the batch is the global one, over all devices (the partitioner adds the sums);
    * the running variance is unbiased, n / (n - 1) of the batch's variance.

    With ``mask``, bool (B,), only those rows count.

    Attributes:
      dtype: of the output.
      frozen: whether training normalizes with the running averages too, and updates neither them nor scale and bias, whose
        gradients are zero. Weight decay must be masked by the optimizer.
    """

    dtype: Any
    frozen: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool, mask: jax.Array | None = None):
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        if self.frozen:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train and not self.frozen:
            axes = tuple(range(x.ndim - 1))
            row_mask, count = None, x.size // x.shape[-1]
            if mask is not None:
                row_mask = mask.reshape(-1, *(1,) * (x.ndim - 1))
                count = jnp.maximum(mask.sum() * (count // x.shape[0]), 1)
            mean = wide.sum(axes, where=row_mask) / count
            square = jnp.square(wide - mean.reshape((1,) * len(axes) + channels))
            var = square.sum(axes, where=row_mask) / count
            if not self.is_initializing():
                running_mean.value += _STATISTICS_RATE * (mean - running_mean.value)
                running_var.value += _STATISTICS_RATE * (var * count / jnp.maximum(count - 1, 1) - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        shape = (1,) * (x.ndim - 1) + channels
        return (wide * factor.reshape(shape) + (bias - mean * factor).reshape(shape)).astype(self.dtype)


class ConvUnit(nn.Module):
    """Convolution without bias, BatchNorm and ReLU, the unit of the published heads. The size of the map stays.

    ``mask`` is passed to ``BatchNorm``; ``sizes``: see ``ops.sizes``.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel, odd.
      dtype: of the computation.
      frozen_batch_norm: see ``BatchNorm.frozen``.
    """

    features: int
    kernel_size: int
    dtype: Any = jnp.float32
    frozen_batch_norm: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool, mask: jax.Array | None = None, sizes: jax.Array | None = None):
        x = clear(x, sizes) if self.kernel_size > 1 else x
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            padding=self.kernel_size // 2,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
            name="conv",
        )(x)
        norm = BatchNorm(dtype=self.dtype, frozen=self.frozen_batch_norm, name="bn")
        return nn.relu(norm(x, train=train, mask=mask))


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor. Source: CaiT (2103.17239).

    Attributes:
      initial_value: of the factors.
      dtype: of the computation.
    """

    initial_value: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.constant(self.initial_value), (x.shape[-1],))
        return x * scale.astype(self.dtype).reshape(1, 1, 1, -1)


class KernelAndBias(nn.Module):
    """The parameters of a ``Linear`` or ``DepthwiseConv`` without its computation, with the same names and initialization.

    Attributes:
      kernel_shape: shape of the kernel; the bias has its last axis.
      fan_in: number of inputs of one output.
    """

    kernel_shape: tuple[int, ...]
    fan_in: int

    @nn.compact
    def __call__(self):
        init = uniform_init(self.fan_in)
        return self.param("kernel", init, self.kernel_shape), self.param("bias", init, self.kernel_shape[-1:])


def perceive_locally(x: jax.Array, sizes: jax.Array | None, *, dtype: Any, implementation: str, name: str) -> jax.Array:
    """The local perception unit, x + convolution(x), for use in a compact method.

    Args:
      x: (B, H, W, C).
      sizes: see ``ops.sizes``.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.
      name: name of the convolution, whose parameters are those of ``DepthwiseConv``.
    """
    options = dict(dtype=dtype, implementation=implementation)
    if sizes is None and perception.uses_pallas(x.shape, **options):  # one op
        parameters = KernelAndBias((3, 3, 1, x.shape[-1]), 9, name=name)()
        return perception.local_perception(x.astype(dtype), *parameters, implementation="pallas")
    return x + DepthwiseConv(**options, name=name)(x, sizes)


class Mlp(nn.Module):
    """Linear, GELU, linear; with ``depthwise`` a 3 x 3 depthwise convolution is added before the GELU.

    Attributes:
      expansion: hidden width, in widths of the input.
      depthwise: whether there is a convolution.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.
    """

    expansion: int = 4
    depthwise: bool = False
    dtype: Any = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x,
        sizes: jax.Array | None = None,
        *,
        norm: tuple[jax.Array, jax.Array] | None = None,
        factors: jax.Array | None = None,
        may_fuse: bool = True,
    ):
        """The MLP of ``x``, or with ``norm`` and ``factors`` the residual branch of ``ops.layers.mlp.conv_mlp``.

        Args:
          x: (B, H, W, C).
          sizes: see ``ops.sizes``.
          norm: scale and bias of LayerNorm, only if ``fuses`` as a branch.
          factors: (B,), factors of the branch, with ``norm``.
          may_fuse: False to run op by op.
        """
        channels, hidden = x.shape[-1], self.expansion * x.shape[-1]
        if norm is not None or (may_fuse and self.fuses(x.shape, sizes)):  # one op, with the parameters below
            linear1 = KernelAndBias((channels, hidden), channels, name="linear1")()
            convolution = KernelAndBias((3, 3, 1, hidden), 9, name="dwc")()
            linear2 = KernelAndBias((hidden, channels), hidden, name="linear2")()
            parameters = (*linear1, *convolution, *linear2)
            branch = dict(zip(("norm_scale", "norm_bias"), norm or (None, None), strict=True), factors=factors)
            return conv_mlp(x.astype(self.dtype), *parameters, **branch, implementation="pallas")
        x = Linear(hidden, name="linear1", dtype=self.dtype)(x)
        if self.depthwise:
            x = x + DepthwiseConv(dtype=self.dtype, implementation=self.implementation, name="dwc")(x, sizes)
        return GeluLinear(channels, dtype=self.dtype, name="linear2")(x)

    def fuses(self, shape: tuple[int, ...], sizes: jax.Array | None, *, is_branch: bool = False) -> bool:
        """Whether the MLP of (B, H, W, C) runs as one kernel; ``is_branch``: with LayerNorm, drop path and residual."""
        options = dict(dtype=self.dtype, implementation=self.implementation, is_branch=is_branch)
        return self.depthwise and sizes is None and uses_pallas(shape, self.expansion * shape[-1], **options)
