"""Models on meshes with Explicit axes: a model runs with Auto axes, in which the partitioner shards the intermediate arrays.

With Explicit axes jax wants the sharding of the result of every reshape and of every sum over a split axis. All operations of
a model keep the batch where it is, so Auto axes give the same program without those.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_BATCH_FREE = ("params", "batch_stats")  # collections of arrays without a batch axis


class MeshModule(nn.Module):
    """A module whose ``apply`` and ``init`` take arrays on meshes with Auto or Explicit axes.

    On Explicit axes, outputs are split along the batch as the first argument that is split along its first axis. Parameters,
    their gradients and the statistics of BatchNorm that ``apply`` and ``init`` return are replicated. Without such a mesh
    nothing changes.
    """

    @nn.nowrap  # as in nn.Module
    def apply(self, variables, *args, mutable: Any = False, **kwargs):
        """See ``nn.Module.apply``."""
        mesh = _explicit_mesh((variables, args, kwargs))
        if mesh is None:
            return super().apply(variables, *args, mutable=mutable, **kwargs)
        with jax.sharding.use_abstract_mesh(_auto_mesh(mesh)):
            arguments = _reshard_to_auto((variables, args, kwargs), mesh)
            out = super().apply(arguments[0], *arguments[1], mutable=mutable, **arguments[2])
        batch = _batch_axis(args)
        if mutable is False:
            return _reshard(out, mesh, batch)
        out, state = out
        return _reshard(out, mesh, batch), _reshard_variables(state, mesh, batch)

    @nn.nowrap  # as in nn.Module
    def init_with_output(self, rngs, *args, **kwargs):
        """See ``nn.Module.init_with_output``."""
        mesh = _explicit_mesh((rngs, args, kwargs))
        if mesh is None:
            return super().init_with_output(rngs, *args, **kwargs)
        with jax.sharding.use_abstract_mesh(_auto_mesh(mesh)):
            arguments = _reshard_to_auto((rngs, args, kwargs), mesh)
            out, variables = super().init_with_output(arguments[0], *arguments[1], **arguments[2])
        batch = _batch_axis(args)
        return _reshard(out, mesh, batch), _reshard_variables(variables, mesh, batch)


def _explicit_mesh(tree) -> AbstractMesh | None:
    """The mesh with Explicit axes of the context or else of the arrays; None without one."""
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in _arrays(tree)))
    return next((mesh for mesh in meshes if AxisType.Explicit in (mesh.axis_types or ())), None)


def _arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _auto_mesh(mesh):
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def _reshard_to_auto(tree, mesh):
    def reshard(leaf):
        if not isinstance(leaf, jax.Array) or jax.typeof(leaf).sharding.mesh.empty:
            return leaf
        return jax.sharding.reshard(leaf, NamedSharding(_auto_mesh(mesh), P()))

    return jax.tree.map(reshard, tree)


def _batch_axis(args):
    """(size, mesh axes) of the batch: the first axis of the first argument that is split there."""
    for array in _arrays(args):
        spec = jax.typeof(array).sharding.spec
        if len(spec) and spec[0] is not None:
            return array.shape[0], spec[0]
    return None, None


def _reshard(tree, mesh, batch):
    size, axes = batch

    def reshard(leaf):
        spec = P(axes) if axes is not None and leaf.shape[:1] == (size,) else P()
        return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(reshard, tree)


def _reshard_variables(variables, mesh, batch):
    return {
        name: _reshard(collection, mesh, (None, None) if name in _BATCH_FREE else batch)
        for name, collection in variables.items()
    }
