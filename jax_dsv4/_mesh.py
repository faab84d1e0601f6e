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

import itertools
from collections.abc import Callable, Iterator, Sequence
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


def split_in_types(
    operation: Operation, avals: Sequence[ShapedArray]
) -> tuple[AbstractMesh, tuple[Any, ...]]:
    """The mesh, and what each group dimension is split over as the operands' types say.

    Axes that are not of type Explicit are in no type, and split nothing here.

    Raises:
      ValueError: anything else is split, or operands disagree; the text names one.
    """
    meshes = [aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty]
    mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
    num_groups, per_group = len(operation.groups_of(avals)), operation.per_group(avals)
    split: list[Any] = [None] * num_groups
    for aval in itertools.compress(avals, per_group):
        own = tuple(aval.sharding.spec)[:num_groups]
        split = [a if a is not None else b for a, b in zip(split, own, strict=True)]
    axes = [
        axis for by in split if by is not None for axis in (by if isinstance(by, tuple) else (by,))
    ]
    for name, aval, is_split in zip(operation.names, avals, per_group, strict=True):
        wanted = [*(split if is_split else [None] * num_groups), *[None] * (aval.ndim - num_groups)]
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
    with_groups = itertools.compress(avals, operation.per_group(avals))
    in_types = all(
        AxisType.Explicit in aval.sharding.mesh.axis_types for aval in with_groups if aval.size
    )
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
    per_group = operation.per_group(operands)
    specs = [PartitionSpec(*groups) if own else PartitionSpec() for own in per_group]
    # An empty operand of shard_map crashes XLA's compiler for GPUs (jax 0.11.2): made inside.
    passed = [i for i, x in enumerate(operands) if i == first or x.size]

    def local(*arrays):
        given = dict(zip(passed, arrays, strict=True))
        local_groups = given[first].shape[:num_groups]
        for i in set(range(len(operands))) - set(passed):
            own = local_groups if per_group[i] else operands[i].shape[:num_groups]
            given[i] = jnp.zeros((*own, *operands[i].shape[num_groups:]), operands[i].dtype)
        return call(*(given[i] for i in range(len(operands))))

    return jax.shard_map(
        local,
        mesh=mesh,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        in_specs=tuple(specs[i] for i in passed),
        out_specs=PartitionSpec(*groups),
    )(*(jax.sharding.reshard(operands[i], NamedSharding(mesh, specs[i])) for i in passed))


def _tiles(
    sharding: Sharding, shape: tuple[int, ...], num_groups: int
) -> tuple[Mesh, PartitionSpec]:
    """The devices in the program's order, and the axes that split each group dimension.

    A mesh of its own, with an axis for each prime factor: the compiler may split a dimension over a
    part of an axis of the user's. In another order of devices, XLA would move every operand; and so
    it would if the factors were in another order than those of the user's axes.
    """

    def first_groups(sharding: Sharding) -> dict[Any, tuple[int, ...]]:
        return {
            device: tuple(axis.start or 0 for axis in index[:num_groups])
            for device, index in sharding.devices_indices_map(shape).items()
        }

    first = first_groups(sharding)
    devices: Any = np.array(list(first), object)
    origin = first[devices[0]]
    mesh, spec = Mesh(devices, "all parts"), PartitionSpec()
    for sizes in _orders_of_prime_factors(len(devices)):
        mesh = Mesh(devices.reshape(sizes), tuple(f"part {i}" for i in range(len(sizes))))
        by_group: list[list[tuple[int, str]]] = [[] for _ in range(num_groups)]
        for axis, name in enumerate(mesh.axis_names):
            neighbour = mesh.devices[tuple(int(i == axis) for i in range(len(sizes)))]
            for group, step in enumerate(np.subtract(first[neighbour], origin)):
                if step:
                    by_group[group].append((-step, name))  # the largest step's axis comes first
        spec = PartitionSpec(*(tuple(name for _, name in sorted(own)) for own in by_group))
        try:
            if first_groups(NamedSharding(mesh, spec)) == first:
                break
        except ValueError:  # these factors do not divide the groups
            continue
    return mesh, spec


def _orders_of_prime_factors(n: int) -> Iterator[tuple[int, ...]]:
    if n == 1:
        yield ()
    primes = (p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p)))
    for prime in primes:
        for others in _orders_of_prime_factors(n // prime):
            yield prime, *others


def over_automatic_axes(call: Call, operation: Operation, operands: Sequence[Any]) -> Call:
    """``call`` on each device's groups, as the compiler splits them."""
    groups, per_group = operation.groups_of(operands), operation.per_group(operands)
    num_groups = len(groups)

    def rule(mesh, operands, results):
        others = []

        def factors(x):
            for axis, size in enumerate(x.shape):
                if axis < num_groups and size == groups[axis]:
                    yield f"g{axis}"
                else:
                    others.append(f"x{len(others)}")
                    yield others[-1]

        sides = (", ".join(" ".join(factors(x)) for x in side) for side in (operands, results))
        return " -> ".join(sides), {"need_replication_factors": tuple(others)}

    def by_groups(x) -> NamedSharding:
        return NamedSharding(*_tiles(x.sharding, x.shape, num_groups))

    def partition(mesh, operands, results):
        split = by_groups(results[0])
        shared = NamedSharding(split.mesh, PartitionSpec())
        given = tuple(split if own else shared for own in per_group)
        return split.mesh, call, (split,) * len(results), given

    def infer(mesh, operands, results):  # where the compiler goes by GSPMD, not by the rule
        return (by_groups(operands[operation.groups_index]),) * len(results)

    split = custom_partitioning(call)
    split.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        decode_shardings=False,
    )
    return split
