"""Calls on meshes: the group dimensions are split over devices, without a collective.

A plain ``ffi_call`` on sharded operands makes XLA gather them all first. Groups are independent
(each has its own pool, and page ids are local to it), so each device can run its own:

- no mesh in scope, or inside ``shard_map``: the call as it is;
- axes of type Explicit, where shardings are part of the types: ``shard_map``, from them;
- axes of type Auto: ``custom_partitioning``, whose rule tells Shardy that the group dimensions may
  be sharded and nothing else may. It costs the persistent compilation cache, hence only here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters.mlir import LoweringRuleContext, ShardingContext
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jax_dsv4._op import Operation

Call = Callable[..., tuple[Array, ...]]


def _specs(groups: Sequence[Any], full: tuple[int, ...], shapes: Sequence[tuple[int, ...]]):
    """The specs of arrays of these shapes, their group dimensions ``full`` split over ``groups``.

    What the groups share has size 1 there, and goes to every device.
    """
    for shape in shapes:
        is_split = shape[: len(full)] == full
        yield PartitionSpec(*groups) if is_split else PartitionSpec()


def split_of(
    operation: Operation, avals: Sequence[ShapedArray]
) -> tuple[AbstractMesh, tuple[Any, ...]]:
    """The mesh, and what each group dimension is split over as the operands' types say.

    Axes that are not of type Explicit are in no type, and split nothing here.

    Raises:
      ValueError: anything else is split, or operands disagree; the text names one.
    """
    num_groups = operation.num_groups(avals)
    meshes = [aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty]
    mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
    full = avals[operation.groups_index].shape[:num_groups]
    groups: list[Any] = [None] * num_groups
    for by_dim, x in ((tuple(x.sharding.spec), x) for x in avals):
        if x.shape[:num_groups] == full:
            groups = [g if g is not None else own for g, own in zip(groups, by_dim, strict=False)]
    names = [
        name for g in groups if g is not None for name in (g if isinstance(g, tuple) else (g,))
    ]
    for name, x in zip(operation.names, avals, strict=True):
        got = tuple(x.sharding.spec)
        wanted = groups if x.shape[:num_groups] == full else [None] * num_groups
        wanted = (*wanted, *(None,) * (x.ndim - num_groups))
        differs = any(g is not None and g != w for g, w in zip(got, wanted, strict=True))
        if differs or len(set(names)) < len(names):
            raise ValueError(
                f"{name}: expected no sharding but that of the leading group dimensions, "
                f"{PartitionSpec(*wanted)}, got {x.sharding.spec}. Layers, pages, rows and "
                "channels cannot be sharded: give each device a group with a pool of its own "
                "(jax.vmap), or reshard"
            )
    return mesh, tuple(groups)


def num_devices(ctx: LoweringRuleContext) -> int:
    """How many devices a program is lowered for; 1 inside ``shard_map``."""
    context = ctx.module_context.axis_context
    return context.num_devices if isinstance(context, ShardingContext) else 1


def split(
    call: Call,
    operation: Operation,
    mesh: AbstractMesh,
    groups: tuple[Any, ...],
    *operands: Array,
) -> tuple[Array, ...]:
    """``call`` on each device's groups, as the types say."""
    num_groups, first = len(groups), operation.groups_index
    full = operands[first].shape[:num_groups]
    specs = list(_specs(groups, full, [x.shape for x in operands]))
    results = jax.eval_shape(call, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    # An empty operand of shard_map crashes XLA's compiler for GPUs (jax 0.11.2): made inside.
    passed = [i for i, x in enumerate(operands) if i == first or x.size]

    def local(*arrays):
        given = dict(zip(passed, arrays, strict=True))
        local_groups = given[first].shape[:num_groups]
        for i in set(range(len(operands))) - set(passed):
            own = local_groups if specs[i] else operands[i].shape[:num_groups]
            given[i] = jnp.zeros((*own, *operands[i].shape[num_groups:]), operands[i].dtype)
        return call(*(given[i] for i in range(len(operands))))

    return jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        in_specs=tuple(specs[i] for i in passed),
        out_specs=tuple(_specs(groups, full, [x.shape for x in results])),
    )(*(jax.sharding.reshard(operands[i], NamedSharding(mesh, specs[i])) for i in passed))


def partitioned(call: Call, of_groups: int, num_groups: int) -> Call:
    """``call`` on each device's groups, as the compiler splits them."""

    def rule(mesh, operands, results):
        full, others = operands[of_groups].shape[:num_groups], []

        def factors(x):
            for axis, size in enumerate(x.shape):
                if axis < num_groups and size == full[axis]:
                    yield f"g{axis}"
                else:
                    others.append(f"x{len(others)}")
                    yield others[-1]

        sides = (", ".join(" ".join(factors(x)) for x in side) for side in (operands, results))
        return " -> ".join(sides), {"need_replication_factors": tuple(others)}

    def partition(mesh, operands, results):
        full, sharding = operands[of_groups].shape[:num_groups], results[0].sharding
        spec = sharding.spec if isinstance(sharding, NamedSharding) else ()  # not on this mesh
        groups = [*spec, *(None,) * num_groups][:num_groups]

        def shardings(arrays):
            return tuple(NamedSharding(mesh, s) for s in _specs(groups, full, arrays))

        operand_shapes, result_shapes = ([x.shape for x in side] for side in (operands, results))
        return mesh, call, shardings(result_shapes), shardings(operand_shapes)

    split = custom_partitioning(call)
    split.def_partition(partition, sharding_rule=rule)
    return split
