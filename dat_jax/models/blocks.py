"""The blocks of a DAT, and the stage that runs them one after the other or as a loop."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dat_jax.models.layers import (
    DepthwiseConv,
    DropPath,
    LayerNorm,
    LayerScale,
    Linear,
    Mlp,
    ScaleAndBias,
    perceive_locally,
)

REMAT_POLICIES = {
    "none": None,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """Local perception unit (optional), attention and MLP, each in a residual branch. ``sizes``: see ``ops.sizes``.

    Attributes:
      make_attention: function of a name that returns the attention module.
      expansion: hidden width of the MLP, in widths of the stage.
      lpu: whether there is a local perception unit, a 3 x 3 depthwise convolution.
      conv_mlp: whether the MLP has a convolution.
      layer_scale_init: initial LayerScale; not positive for none.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.
    """

    make_attention: Any
    expansion: int
    lpu: bool
    conv_mlp: bool
    layer_scale_init: float
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x, drop_path_rate, train: bool, sizes: jax.Array | None = None):
        def add_branch(x, module, index, **options):
            if self.layer_scale_init <= 0 and module.fuses(x.shape, sizes, is_branch=True):
                norm = ScaleAndBias(x.shape[-1], name=f"norm{index}")()
                wide = jnp.promote_types(self.dtype, jnp.float32)
                factors = DropPath().factors(len(x), drop_path_rate, dtype=wide, train=train)
                return module(x, norm=norm, factors=factors)
            branch = module(LayerNorm(name=f"norm{index}", dtype=self.dtype)(x), sizes, **options)
            if self.layer_scale_init > 0:
                branch = LayerScale(self.layer_scale_init, dtype=self.dtype, name=f"layer_scale{index}")(branch)
            return x + DropPath()(branch, drop_path_rate, train=train)

        options = dict(dtype=self.dtype, implementation=self.implementation)
        if self.lpu:
            x = perceive_locally(x, sizes, **options, name="lpu")
        x = add_branch(x, self.make_attention(name="attn"), 1)
        mlp = Mlp(self.expansion, self.conv_mlp, **options, name="mlp")
        return add_branch(x, mlp, 2, may_fuse=self.layer_scale_init > 0)  # otherwise it was asked for as a branch


class ConvBlock(nn.Module):
    """Local perception unit (optional), then depthwise convolution, LayerNorm and MLP in one branch (stage type X).

    ``sizes``: see ``ops.sizes``.

    Attributes:
      window_size: kernel size of the convolution, odd.
      expansion: hidden width of the MLP, in widths of the stage.
      lpu: whether there is a local perception unit, a 3 x 3 depthwise convolution.
      conv_mlp: whether the MLP has a convolution.
      dtype: of the computation.
      implementation: see ``ops.dispatch``.

    Source: ConvNeXt (2201.03545), as in the published DAT++ code.
    """

    window_size: int
    expansion: int
    lpu: bool
    conv_mlp: bool
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x, drop_path_rate, train: bool, sizes: jax.Array | None = None):
        options = dict(dtype=self.dtype, implementation=self.implementation)
        if self.lpu:
            x = perceive_locally(x, sizes, **options, name="lpu")
        branch = DepthwiseConv(self.window_size, **options, name="conv")(x, sizes)
        branch = LayerNorm(name="norm", dtype=self.dtype)(branch)
        branch = Mlp(self.expansion, self.conv_mlp, **options, name="mlp")(branch, sizes)
        return x + DropPath()(branch, drop_path_rate, train=train)


class Stage(nn.Module):
    """The blocks of one resolution, after a linear layer if the input has other channels. ``sizes``: see ``ops.sizes``.

    Attributes:
      features: channels.
      blocks: functions of a name and a parent that return a block.
      drop_path_rates: drop path rate of each block.
      period: blocks i and i + period have the same type.
      scan: whether the repetitions of the first ``period`` blocks are one loop over their stacked parameters, so that only one
        repetition is compiled. The parameters keep their names.
      dtype: of the computation.
    """

    features: int
    blocks: Any
    drop_path_rates: tuple[float, ...]
    period: int
    scan: bool
    dtype: Any

    @nn.compact
    def __call__(self, x, *, train: bool, sizes: jax.Array | None = None):
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="proj", dtype=self.dtype)(x)
        if self.scan and len(self.blocks) > self.period and not self.is_initializing():
            return self._scan(x, train, sizes)
        for index, (make_block, rate) in enumerate(zip(self.blocks, self.drop_path_rates, strict=True)):
            # Training changes nothing but drop path. Under remat the rate is traced, so test for zero here.
            x = make_block(name=f"blocks_{index}", parent=self)(x, rate, train and rate > 0, sizes)
        return x

    def _scan(self, x, train, sizes):
        """Runs all repetitions of the first ``period`` blocks in a loop."""
        blocks = [make_block(name=None, parent=None) for make_block in self.blocks[: self.period]]
        params = self.variables["params"]

        def stack(position):  # parameters of the blocks at one position of the period: (repetitions, ...)
            trees = [params[f"blocks_{index}"] for index in range(position, len(self.blocks), self.period)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        repetitions = len(self.blocks) // self.period
        rates = jnp.asarray(self.drop_path_rates, jnp.float32).reshape(repetitions, self.period)
        random = train and max(self.drop_path_rates) > 0
        keys = jax.random.split(self.make_rng("dropout"), rates.shape) if random else None
        sow = self.is_mutable_collection("intermediates")

        def repetition(x, inputs):
            params, rates, keys = inputs
            sown = []
            for position, block in enumerate(blocks):
                rngs = {"dropout": keys[position]} if random else {}
                arguments = ({"params": params[position]}, x, rates[position], random, sizes)
                if sow:
                    x, state = block.apply(*arguments, rngs=rngs, mutable=["intermediates"])
                    sown.append(state.get("intermediates", {}))
                else:
                    x = block.apply(*arguments, rngs=rngs)
            return x, sown

        x, sown = jax.lax.scan(repetition, x, ([stack(position) for position in range(self.period)], rates, keys))
        for index in range(len(self.blocks) if sow else 0):
            intermediates = jax.tree.map(lambda leaf, i=index: leaf[i // self.period], sown[index % self.period])
            if intermediates:
                self.put_variable("intermediates", f"blocks_{index}", intermediates)
        return x


def with_remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Applies ``DAT.remat`` to a block."""
    if policy == "none":
        return block
    # Argument 3 is ``train``, which changes the computation; argument 0 is the module.
    return nn.remat(block, static_argnums=(3,), policy=REMAT_POLICIES[policy])


def find_period(kinds: str) -> int:
    """Length of the shortest repeated part: 2 for "NDNDND", 1 for "DD", 3 for "NDD"."""
    return next(p for p in range(1, len(kinds) + 1) if kinds[:p] * (len(kinds) // p) == kinds)
