"""Calls on meshes: the group dimensions are split over devices, without a collective.

A plain ``ffi_call`` on sharded operands makes XLA gather them all first. Groups are independent
(each has its own pool, and page ids are local to it), so each device can run its own:

- no mesh in scope, or inside ``shard_map``: the call as it is;
- axes of type Explicit, where shardings are part of the types: ``shard_map``, from them;
- axes of type Auto: ``custom_partitioning``, whose rule tells Shardy that the group dimensions may
  be sharded and nothing else may. It costs the persistent compilation cache, hence only here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def _split_explicit(call: Call, operation: Operation, operands: Sequence[Array]):
    num_groups, first = operation.num_groups(operands), operation.groups_index
    of_groups = jax.typeof(operands[first])
    groups, full = tuple(of_groups.sharding.spec)[:num_groups], of_groups.shape[:num_groups]
    specs = list(_specs(groups, full, [x.shape for x in operands]))
    for name, x, want in zip(operation.names, operands, specs, strict=True):
        got = tuple(jax.typeof(x).sharding.spec)
        wanted = (*want, *(None,) * (x.ndim - len(want)))
        if any(g is not None and g != w for g, w in zip(got, wanted, strict=True)):
            raise ValueError(
                f"{name}: expected no sharding but that of the leading group dimensions of "
                f"{operation.groups}, {PartitionSpec(*wanted)}, got {PartitionSpec(*got)}. Layers, "
                "pages, rows and channels cannot be sharded: give each device a group with a pool "
                "of its own (jax.vmap), or reshard"
            )
    results = jax.eval_shape(call, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    mesh = of_groups.sharding.mesh
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
        in_specs=tuple(specs[i] for i in passed),
        out_specs=tuple(_specs(groups, full, [x.shape for x in results])),
    )(*(jax.sharding.reshard(operands[i], NamedSharding(mesh, specs[i])) for i in passed))


def _auto_split(call: Call, of_groups: int, num_groups: int) -> Call:
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


def over_groups(call: Call, operation: Operation) -> Call:
    """``call``, with its group dimensions over whatever mesh there is.

    The operation's ``groups`` and every result have the group dimensions in front; the other
    operands have them, or as many ones.
    """
    of_groups = operation.groups_index
    auto_split = functools.cache(functools.partial(_auto_split, call, of_groups))

    def on_mesh(*operands):
        num_groups = operation.num_groups(operands)
        mesh = jax.typeof(operands[of_groups]).sharding.mesh
        if mesh.empty:
            mesh = jax.sharding.get_abstract_mesh()
        types = () if mesh.empty else mesh.axis_types
        if AxisType.Manual in types or not types:
            return call(*operands)
        if AxisType.Explicit in types:
            return _split_explicit(call, operation, operands)
        return auto_split(num_groups)(*operands) if num_groups else call(*operands)

    return on_mesh
