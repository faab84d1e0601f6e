"""Calls on several devices: the group dimensions are split over them, without a collective.

XLA gathers whatever is sharded in front of a custom call. But groups are independent (each has its
own pool, and page ids are local to it), so each device can run its own. How they are split:

- over axes of type Explicit, the operands' types say, whether or not a mesh is in scope: then a
  ``shard_map`` over the mesh;
- otherwise only the compiler knows, after it was told of arguments, results and constraints:
  ``custom_partitioning``, whose rule tells Shardy that the group dimensions may be sharded and
  nothing else may. It costs the persistent compilation cache, hence is lowered only where a program
  runs on several devices;
- inside ``shard_map``, a call works on what its device was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters.mlir import LoweringRuleContext, ShardingContext
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

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


def split_in_types(
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
    has_groups = [aval.shape[:num_groups] == full for aval in avals]
    split: list[Any] = [None] * num_groups
    for aval, is_full in zip(avals, has_groups, strict=True):
        if is_full:
            own = tuple(aval.sharding.spec)[:num_groups]
            split = [a if a is not None else b for a, b in zip(split, own, strict=True)]
    axes = [
        axis for by in split if by is not None for axis in (by if isinstance(by, tuple) else (by,))
    ]
    for name, aval, is_full in zip(operation.names, avals, has_groups, strict=True):
        wanted = [*(split if is_full else [None] * num_groups), *[None] * (aval.ndim - num_groups)]
        got = tuple(aval.sharding.spec)
        differs = any(g is not None and g != w for g, w in zip(got, wanted, strict=True))
        if differs or len(set(axes)) < len(axes):
            raise ValueError(
                f"{name}: expected no sharding but that of the leading group dimensions, "
                f"{PartitionSpec(*wanted)}, got {aval.sharding.spec}. Layers, pages, rows and "
                "channels cannot be sharded: give each device a group with a pool of its own "
                "(jax.vmap), or reshard"
            )
    return mesh, tuple(split)


def types_say_all(operation: Operation, avals: Sequence[ShapedArray], mesh: AbstractMesh) -> bool:
    """Whether the compiler finds no more than ``split_in_types``."""
    num_groups = operation.num_groups(avals)
    full = avals[operation.groups_index].shape[:num_groups]
    with_groups = (aval for aval in avals if aval.size and aval.shape[:num_groups] == full)
    in_types = all(AxisType.Explicit in aval.sharding.mesh.axis_types for aval in with_groups)
    return in_types or AxisType.Manual in mesh.axis_types


def num_devices(ctx: LoweringRuleContext) -> int:
    """How many devices a program is lowered for; 1 inside ``shard_map``."""
    context = ctx.module_context.axis_context
    return context.num_devices if isinstance(context, ShardingContext) else 1


def over_explicit_axes(
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


def _tiles(sharding: Sharding, shape: tuple[int, ...], num_groups: int) -> Mesh:
    """The devices by the groups that they have, an axis for each dimension; the last: alike.

    A mesh of its own: the compiler may split a dimension over a part of an axis of the user's.
    """
    by_first: dict[tuple[int, ...], list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        first = tuple(axis.start or 0 for axis in index[:num_groups])
        by_first.setdefault(first, []).append(device)
    counts = [len({first[axis] for first in by_first}) for axis in range(num_groups)]
    devices: Any = np.array([by_first[first] for first in sorted(by_first)], object)
    return Mesh(
        devices.reshape(*counts, -1), (*(f"groups {i}" for i in range(num_groups)), "alike")
    )


def over_automatic_axes(call: Call, operation: Operation, operands: Sequence[Any]) -> Call:
    """``call`` on each device's groups, as the compiler splits them."""
    of_groups, num_groups = operation.groups_index, operation.num_groups(operands)

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
        full = operands[of_groups].shape[:num_groups]
        tiles = _tiles(results[0].sharding, results[0].shape, num_groups)
        groups = tiles.axis_names[:num_groups]

        def shardings(arrays):
            shapes = [x.shape for x in arrays]
            return tuple(NamedSharding(tiles, spec) for spec in _specs(groups, full, shapes))

        return tiles, call, shardings(results), shardings(operands)

    def infer(mesh, operands, results):  # where the compiler goes by GSPMD, not by the rule
        tiles = _tiles(operands[of_groups].sharding, operands[of_groups].shape, num_groups)
        sharding = NamedSharding(tiles, PartitionSpec(*tiles.axis_names[:num_groups]))
        return (sharding,) * len(results)

    split = custom_partitioning(call)
    split.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        decode_shardings=False,
    )
    return split
