"""What an operation is, and the stack of transforms that every operation goes through.

A call is one primitive of JAX: a derivative is a clear error, and mapped axes become group
dimensions. Lowered for a platform and its devices, it is split over these (``_mesh.py``), and
becomes the custom call, or the jnp reference, which is traced only then.

Every operand carries the group dimensions in front (``ffi/operands.h``): ``[*G, ...]`` where it is
written, ``[*G, ...]`` or all ones where it is only read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
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
    of_layers: bool = False  # one more axis in front where a call names a layer
    like: str | None = None  # the operand whose groups it has, unless it is empty


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Operation:
    """All that the stack knows of an operation.

    Attributes:
      name: of the public function.
      target: of the custom call.
      operands: in the order of the call; the written ones are its last results, in this order.
      groups: the operand whose leading dimensions are the groups; a written one, if there is any.
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

    def __repr__(self) -> str:  # in a jaxpr
        return self.name

    def groups_of(self, operands: Sequence[Any]) -> tuple[int, ...]:
        """The group dimensions that these operands have."""
        x, rank = operands[self.groups_index], self.operands[self.groups_index].rank
        return x.shape[: x.ndim - rank]

    def per_group(self, operands: Sequence[Any]) -> list[bool]:
        """Of each of these operands, whether it is one per group; the groups share the others."""
        groups = self.groups_of(operands)
        return [x.shape[: len(groups)] == groups for x in operands]

    def with_layers(self) -> Operation:
        """The same on arrays that hold all layers of a kind."""
        return dataclasses.replace(
            self,
            operands=tuple(
                dataclasses.replace(operand, rank=operand.rank + operand.of_layers)
                for operand in self.operands
            ),
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel, as ``implementation`` of a call: for benchmarks and tests."""

    target: str | None = None  # the operation's own
    geometry: int = -1  # how it is launched; -1: as was measured to be fastest


class _Static(NamedTuple):
    """What is known of a call before its operands."""

    operation: Operation
    options: Any
    implementation: str | Kernel | None


# One call of an operation. A primitive, so that it is lowered for each platform by its own rule,
# which traces the reference only where it is what runs.
_call = Primitive("paged_operation")
_call.multiple_results = True


def of_layers(reference: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """A reference whose last operand is the layer, for options that may hold it instead."""

    def run(*operands: Array, layer: int, **options: Any) -> tuple[Array, ...]:
        if layer >= 0:
            operands = (*operands[:-1], jnp.full(1, layer, jnp.int32))
        return reference(*operands, **options)

    return run


def call(
    operation: Operation, options: Hashable, implementation: str | Kernel | None, *operands: Array
) -> tuple[Array, ...]:
    """The operation on operands without group dimensions -> its results.

    ``options`` is a frozen dataclass: the static side of a call, which the record's functions read.
    """
    return _bind(_Static(operation, options, implementation), *vary_alike(operands))


def vary_alike(operands: Sequence[Array]) -> list[Array]:
    """Inside ``shard_map``, make every operand vary over the axes that any of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def _bind(static: _Static, *operands: Array) -> tuple[Array, ...]:
    operation = static.operation
    avals = [jax.typeof(x) for x in operands]
    mesh, split = _mesh.split_in_types(operation, avals)
    partitioned = None
    if split and static.implementation != "xla" and not _mesh.types_say_all(operation, avals, mesh):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
        # What JAX makes of it depends on these, too.
        mode = mesh, jax.config.jax_use_shardy_partitioner  # pyright: ignore[reportAttributeAccessIssue]
        partitioned = _partitioned(static, shapes, mode)
    return tuple(_call.bind(*operands, static=static, partitioned=partitioned))


@functools.lru_cache(maxsize=4096)
def _partitioned(
    static: _Static, shapes: tuple[jax.ShapeDtypeStruct, ...], mode: Hashable
) -> ClosedJaxpr:
    """The call, on devices among which the compiler splits it.

    Made before lowering, for JAX to see in it that a program with this call depends on its devices.
    """
    split = _mesh.over_automatic_axes(_part_of(static), static.operation, shapes)
    return jax.make_jaxpr(split)(*shapes)


@functools.cache
def _part_of(static: _Static) -> _mesh.Call:
    """The call on what one device has of the operands."""
    return lambda *operands: tuple(_call.bind(*operands, static=static, partitioned=None))


@_call.def_impl
def _run_eagerly(*operands: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # which would bind, and come here, again
        return _jitted(**params)(*operands)


@functools.lru_cache(maxsize=4096)
def _jitted(static: _Static, partitioned: ClosedJaxpr | None) -> Callable[..., list[Array]]:
    def run(*operands: Array) -> list[Array]:
        return _call.bind(*operands, static=static, partitioned=partitioned)

    # For JAX's errors, of operands that are on different devices.
    operation = static.operation
    run.__name__ = run.__qualname__ = operation.name
    names = [re.sub(r"\W+", "_", name) for name in operation.names]
    run.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    )
    return jax.jit(run)


@_call.def_abstract_eval
def _types(
    *avals: ShapedArray, static: _Static, partitioned: ClosedJaxpr | None
) -> list[ShapedArray]:
    operation = static.operation
    mesh, split = _mesh.split_in_types(operation, avals)
    of_groups = avals[operation.groups_index]
    groups = of_groups.shape[: len(split)]

    def result(shape: Sequence[int], dtype: DTypeLike) -> ShapedArray:
        spec = PartitionSpec(*split, *(None,) * (len(shape) - len(split)))
        sharding = NamedSharding(mesh, spec)
        return of_groups.update(
            shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding
        )

    others = operation.results(static.options, *_without_groups(operation, avals))
    return [
        *(result((*groups, *shape), dtype) for shape, dtype in others),
        *(result(avals[i].shape, avals[i].dtype) for i in operation.written),
    ]


def _without_groups(operation: Operation, avals: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(x.shape[x.ndim - operand.rank :], x.dtype)
        for operand, x in zip(operation.operands, avals, strict=True)
    ]


# ----------------------------------------------------------------------------------- its transforms


def _differentiate(primals: Any, tangents: Any, *, static: _Static, **_: Any) -> Any:
    raise NotImplementedError(
        f"{static.operation.name} has no derivative: it updates a cache, for inference only. "
        "Put jax.lax.stop_gradient around its operands"
    )


def _batch(
    operands: Sequence[Array], axes: Sequence[int | None], *, static: _Static, **_: Any
) -> tuple[tuple[Array, ...], list[int]]:
    """Turn a mapped axis into one more group dimension.

    What is written, or has the groups, is broadcast where it is unmapped: a copy per index is what
    vmap means. Others get size 1 there, unless other groups already differ in them.
    """
    operation = static.operation
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    in_front = [
        x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    groups = (size, *operation.groups_of(in_front)[1:])
    mapped = {}
    for operand, x in zip(operation.operands, in_front, strict=True):
        is_own = operand.written or operand.name == operation.groups or _differs(operand, x)
        mapped[operand.name] = _broadcast(operand, x, groups) if is_own else x
    for operand in operation.operands:
        if operand.like is not None and mapped[operand.name].shape[-1]:  # not an absent one
            pair = (operand, operation[operand.like])
            if any(_differs(o, mapped[o.name]) for o in pair):
                for o in pair:
                    mapped[o.name] = _broadcast(o, mapped[o.name], groups)
    results = _bind(static, *mapped.values())
    return results, [0] * len(results)


def _differs(operand: Operand, x: Array) -> bool:
    """Whether groups differ in it."""
    return math.prod(x.shape[: x.ndim - operand.rank]) != 1


def _broadcast(operand: Operand, x: Array, groups: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(x, (*groups, *x.shape[x.ndim - operand.rank :]))


ad.primitive_jvps[_call] = _differentiate
batching.primitive_batchers[_call] = _batch


# ------------------------------------------------------------------------------------- its lowering


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    platform: str,
    static: _Static,
    partitioned: ClosedJaxpr | None,
) -> Sequence[Any]:
    operation, options, implementation = static
    avals: Sequence[Any] = ctx.avals_in
    mesh, split = _mesh.split_in_types(operation, avals)
    if any(split):
        run = functools.partial(_mesh.over_explicit_axes, _part_of(static), operation, mesh, split)
    elif implementation == "xla" or not _ffi.has_kernel(operation.target, platform, implementation):
        if implementation not in (None, "xla"):
            platforms = ctx.module_context.platforms
            others = [p for p in platforms if p not in _ffi.PLATFORMS] or platforms
            raise NotImplementedError(
                f"{operation.name}: implementation={implementation!r} is not there on "
                f"{' or '.join(others)}"
            )
        run = functools.partial(_run_reference, operation, options)
    elif partitioned is not None and _mesh.num_devices(ctx) > 1:
        run = jaxpr_as_fun(partitioned)
    else:
        return _lower_to_custom_call(static, ctx, *operands)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)


def _lower_to_custom_call(
    static: _Static, ctx: mlir.LoweringRuleContext, *operands: Any
) -> Sequence[Any]:
    operation, options, implementation = static
    kernel = implementation if isinstance(implementation, Kernel) else Kernel()
    others = len(ctx.avals_out) - len(operation.written)
    rule = jax.ffi.ffi_lowering(
        kernel.target or operation.target,
        operand_output_aliases={i: others + n for n, i in enumerate(operation.written)},
    )
    attributes = operation.attributes(options, *_without_groups(operation, ctx.avals_in))
    return rule(ctx, *operands, **attributes, geometry=int(kernel.geometry))


def _run_reference(operation: Operation, options: Any, *operands: Array) -> tuple[Array, ...]:
    per_group = operation.per_group(operands)
    run = functools.partial(operation.reference, **vars(options))
    for _ in operation.groups_of(operands):
        run = jax.vmap(run, in_axes=tuple(0 if own else None for own in per_group))
    one = zip(operands, per_group, _without_groups(operation, operands), strict=True)
    return run(*(x if own else x.reshape(core.shape) for x, own, core in one))


for _platform in _ffi.PLATFORMS:
    mlir.register_lowering(_call, functools.partial(_lower, platform=_platform), _platform)
mlir.register_lowering(_call, functools.partial(_lower, platform=""))  # all others
