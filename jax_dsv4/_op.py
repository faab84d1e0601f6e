"""What an operation is, and the stack of transforms that every operation goes through.

From the outside in:

    custom_jvp (a clear error) -> custom_vmap (mapped axes become group dimensions)
      -> over the mesh, if there is one (_mesh.py)
      -> the platform's implementation: ffi_call, or the jnp reference

Every operand carries the group dimensions in front (``ffi/operands.h``): ``[*G, ...]`` where it is
written, ``[*G, ...]`` or all ones where it is only read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_dsv4 import _ffi, _mesh

# What jax.export must be told to let pass: targets' names and attributes are kept compatible.
EXPORT_DISABLED_CHECKS = tuple(map(jax.export.DisabledSafetyCheck.custom_call, _ffi.TARGETS))


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand: its name in errors, and its rank without group dimensions."""

    name: str
    rank: int
    written: bool = False  # updated in place, and returned
    like: str | None = None  # the operand whose groups it has, unless it is empty


@dataclasses.dataclass(frozen=True)
class Operation:
    """All that the stack knows of an operation.

    Attributes:
      name: of the public function.
      target: of the custom call.
      operands: in the order of the call; the written ones are its last results, in this order.
      groups: the operand whose leading dimensions are the groups; a written one.
      results: ``(options, *operands) -> [(shape, dtype), ...]`` of the other results, without
        group dimensions; the operands come as ``ShapeDtypeStruct`` without them, too.
      attributes: ``(options, *operands) -> {name: value}`` of the call, each of its exact type.
      reference: ``(*operands, **options)`` in plain jnp, without group dimensions -> all results.
    """

    name: str
    target: str
    operands: tuple[Operand, ...]
    groups: str
    results: Callable[..., Sequence[tuple[Sequence[int], DTypeLike]]]
    attributes: Callable[..., Mapping[str, Any]]
    reference: Callable[..., tuple[Array, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The operands' names."""
        return tuple(operand.name for operand in self.operands)

    @property
    def written(self) -> tuple[int, ...]:
        """Indices of the operands that are written."""
        return tuple(i for i, operand in enumerate(self.operands) if operand.written)

    @property
    def groups_index(self) -> int:
        """The index of the operand whose leading dimensions are the groups."""
        return self.names.index(self.groups)

    def __getitem__(self, name: str) -> Operand:
        """The operand of this name."""
        return self.operands[self.names.index(name)]

    def num_groups(self, operands: Sequence[Any]) -> int:
        """How many group dimensions these operands have."""
        of_groups = self.groups_index
        return operands[of_groups].ndim - self.operands[of_groups].rank

    def with_layers(self) -> Operation:
        """The same on arrays that hold all layers of a kind: what is written has one more axis."""
        return dataclasses.replace(
            self,
            operands=tuple(
                dataclasses.replace(operand, rank=operand.rank + operand.written)
                for operand in self.operands
            ),
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel, as ``implementation`` of a call: for benchmarks and tests."""

    target: str | None = None  # the operation's own
    geometry: int = -1  # how it is launched; -1: as was measured to be fastest


def _cores(operation: Operation, operands: Sequence[Any]) -> list[tuple[int, ...]]:
    return [
        x.shape[x.ndim - operand.rank :]
        for operand, x in zip(operation.operands, operands, strict=True)
    ]


def _call_ffi(
    operation: Operation, options: Any, kernel: Kernel, *operands: Array
) -> tuple[Array, ...]:
    of_groups = operands[operation.groups_index]
    groups = of_groups.shape[: operation.num_groups(operands)]
    cores = [
        jax.ShapeDtypeStruct(core, x.dtype)
        for core, x in zip(_cores(operation, operands), operands, strict=True)
    ]
    # Inside shard_map, what varies over the mesh is part of the types, and alike by now.
    aval = jax.typeof(of_groups)
    result = functools.partial(
        jax.ShapeDtypeStruct,
        sharding=None if aval.sharding.mesh.empty else NamedSharding(aval.sharding.mesh, P()),
        manual_axis_type=aval.manual_axis_type,
    )
    others = [
        result((*groups, *shape), dtype) for shape, dtype in operation.results(options, *cores)
    ]
    updated = [result(operands[i].shape, operands[i].dtype) for i in operation.written]
    return jax.ffi.ffi_call(
        kernel.target or operation.target,
        (*others, *updated),
        input_output_aliases={i: len(others) + n for n, i in enumerate(operation.written)},
    )(*operands, **operation.attributes(options, *cores), geometry=int(kernel.geometry))  # pyright: ignore[reportReturnType]


def _call_reference(operation: Operation, options: Any, *operands: Array) -> tuple[Array, ...]:
    groups = operands[operation.groups_index].shape[: operation.num_groups(operands)]
    cores = _cores(operation, operands)
    per_group = [x.shape == groups + core for x, core in zip(operands, cores, strict=True)]
    call = functools.partial(operation.reference, **dataclasses.asdict(options))
    for _ in groups:
        call = jax.vmap(call, in_axes=tuple(0 if mapped else None for mapped in per_group))
    return call(
        *(x if m else x.reshape(c) for x, m, c in zip(operands, per_group, cores, strict=True))
    )


def _map(
    operation: Operation, axis_size: int, batched: Sequence[bool], operands: Sequence[Array]
) -> list[Array]:
    """Turn a mapped axis, in front where ``batched``, into one more group dimension.

    What is written is broadcast where it is unmapped: a copy per index is what vmap means. An
    unmapped operand that is only read gets size 1 there, unless other groups already differ in it.
    """
    of_groups = operation.groups_index
    rank = operation.num_groups(operands) - int(batched[of_groups])
    groups = operands[of_groups].shape[int(batched[of_groups]) :][:rank]
    mapped = {}
    for operand, x, is_batched in zip(operation.operands, operands, batched, strict=True):
        if not is_batched:
            x = x[None]
        mapped[operand.name] = x
        if operand.written or _is_per_group(operand, x):
            mapped[operand.name] = _per_group(operand, x, (axis_size, *groups))
    for operand in operation.operands:
        if operand.like is not None and mapped[operand.name].shape[-1]:  # not an absent one
            pair = (operand, operation[operand.like])
            if any(_is_per_group(o, mapped[o.name]) for o in pair):
                for o in pair:
                    mapped[o.name] = _per_group(o, mapped[o.name], (axis_size, *groups))
    return list(mapped.values())


def _is_per_group(operand: Operand, x: Array) -> bool:
    return math.prod(x.shape[: x.ndim - operand.rank]) != 1


def _per_group(operand: Operand, x: Array, groups: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(x, (*groups, *x.shape[x.ndim - operand.rank :]))


def _vary_alike(operands: Sequence[Array]) -> list[Array]:
    """Inside ``shard_map``, make every operand vary over the axes that any of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


@functools.cache
def bind(
    operation: Operation, options: Hashable, implementation: str | Kernel | None
) -> Callable[..., tuple[Array, ...]]:
    """The operation on ``[*G, ...]`` operands -> its results; cached, so that jit's caches hit.

    ``options`` is a frozen dataclass: the static side of a call, which the record's functions read.
    """
    kernel = implementation if isinstance(implementation, Kernel) else Kernel()
    compiled = functools.partial(_call_ffi, operation, options, kernel)
    plain = functools.partial(_call_reference, operation, options)

    def on_platform(*operands):
        operands = _vary_alike(operands)
        if implementation == "xla":
            return plain(*operands)
        if implementation is not None:
            return jax.lax.platform_dependent(*operands, cpu=compiled, cuda=compiled)
        on_cuda = compiled if _ffi.HAS_CUDA else plain
        return jax.lax.platform_dependent(*operands, cpu=compiled, cuda=on_cuda, default=plain)

    over_mesh = jax.custom_batching.custom_vmap(_mesh.over_groups(on_platform, operation))

    @over_mesh.def_vmap
    def _(axis_size, batched, *operands):
        results = over_mesh(*_map(operation, axis_size, batched, operands))
        return results, (True,) * len(results)

    @jax.custom_jvp
    def without_derivative(*operands):
        return over_mesh(*operands)

    @without_derivative.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"{operation.name} has no derivative: it updates a cache, for inference only. "
            "Put jax.lax.stop_gradient around its operands"
        )

    return without_derivative
