"""The custom call: loading the extension modules, registration, attributes, and transforms.

An operation is, from the outside in:

    custom_jvp (a clear error) -> custom_vmap (mapped axes become group dimensions)
      -> over the mesh, if there is one (_mesh.py)
      -> the platform's implementation: ffi_call, or the jnp reference

Every operand carries the group dimensions in front (``ffi/operands.h``): ``[*G, ...]`` on the
state, ``[*G, ...]`` or all ones on what is only read.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import _config, _cpu, _mesh, reference

# The operands, and their ranks without group dimensions.
_CORES = {
    "state.kv": 3,
    "state.score": 3,
    "kv_score": 3,
    "ape": 2,
    "kv_tables": 2,
    "score_tables": 2,
    "kv_lens": 1,
    "q_lens": 1,
}
_CORE_RANKS = tuple(_CORES.values())
_NUM_STATE = 2  # the first operands: written, and aliased by the first results
AUTO_GEOMETRY = -1


def _running_ffi_version() -> tuple[int, int]:
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # pyright: ignore[reportOptionalSubscript]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _load(name: str, platform: str) -> ModuleType | None:
    """Import an extension module and register its handler; ``None`` if it was not built.

    A handler built against a newer XLA FFI than the running jaxlib's would stop every backend of
    JAX from starting, not only this package: hence the check before registration.
    """
    if importlib.util.find_spec(f"jax_dsv4.{name}") is None:
        return None
    module = importlib.import_module(f"jax_dsv4.{name}")
    built, running = module.FFI_VERSION, _running_ffi_version()
    if built[0] != running[0] or built > running:
        raise ImportError(
            f"jax_dsv4.{name} was built against XLA FFI {built[0]}.{built[1]}, but the installed "
            f"jaxlib has {running[0]}.{running[1]}: upgrade jax and jaxlib, or rebuild jax_dsv4 "
            "against this jaxlib (pip install --no-build-isolation .)"
        )
    jax.ffi.register_ffi_target(module.TARGET_NAME, module.handler(), platform=platform)
    return module


_load("_cpu", "cpu")
TARGET_NAME = _cpu.TARGET_NAME
HAS_CUDA = _load("_cuda", "CUDA") is not None

# What jax.export must be told to let pass: the target's name and attributes are kept compatible.
EXPORT_DISABLED_CHECKS = (jax.export.DisabledSafetyCheck.custom_call(TARGET_NAME),)


def check_available(implementation: str | None) -> None:
    """Say so where JAX runs on a GPU by default, but this package was built without CUDA."""
    if HAS_CUDA:
        return
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(default, "platform", default) or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return
    problem = "jax_dsv4 was built without a CUDA compiler"
    remedy = "see Troubleshooting in its README"
    if implementation == "ffi":
        raise RuntimeError(f'implementation="ffi": {problem}; {remedy}')
    warnings.warn(f"{problem}: on a GPU, the slow jnp reference runs; {remedy}", stacklevel=4)


@dataclasses.dataclass(frozen=True)
class Decode:
    """The static side of a decode call; hashable, so that equal calls share one operation."""

    compress_ratio: int
    overlap: bool
    state_format: str
    out_dtype: np.dtype
    implementation: str | None
    geometry: int = AUTO_GEOMETRY  # index into Shape.geometries: for benchmarks


# xla::ffi::DataType, the 8-bit enumeration that the dtype attributes are typed as.
_DATA_TYPE = {jnp.dtype(jnp.float32): np.uint8(11), jnp.dtype(jnp.bfloat16): np.uint8(16)}


def _call_ffi(static: Decode, *operands: Array) -> tuple[Array, Array, Array]:
    kv, score, kv_score = operands[:3]
    groups, state_dim = kv.shape[:-3], kv.shape[-1]
    batch, next_n = kv_score.shape[-3:-1]
    num_windows = -(-next_n // static.compress_ratio)
    head_dim = state_dim // 2 if static.overlap else state_dim
    # Inside shard_map, what varies over the mesh is part of the types, and alike by now.
    aval = jax.typeof(kv)
    result = functools.partial(
        jax.ShapeDtypeStruct,
        sharding=None if aval.sharding.mesh.empty else NamedSharding(aval.sharding.mesh, P()),
        manual_axis_type=aval.manual_axis_type,
    )
    return jax.ffi.ffi_call(
        TARGET_NAME,
        (
            result(kv.shape, kv.dtype),
            result(score.shape, score.dtype),
            result((*groups, batch, num_windows, head_dim), static.out_dtype),
        ),
        input_output_aliases={i: i for i in range(_NUM_STATE)},
    )(
        *operands,
        compress_ratio=int(static.compress_ratio),
        next_n=int(next_n),
        kv_score_dtype=_DATA_TYPE[kv_score.dtype],
        state_format=np.uint8(_config.STATE_FORMATS.index(static.state_format)),
        state_dtype=_DATA_TYPE[kv.dtype],
        out_dtype=_DATA_TYPE[static.out_dtype],
        geometry=int(static.geometry),
    )  # pyright: ignore[reportReturnType]


def _call_reference(static: Decode, *operands: Array) -> tuple[Array, Array, Array]:
    groups = operands[0].shape[: -_CORE_RANKS[0]]
    cores = [x.shape[-rank:] for x, rank in zip(operands, _CORE_RANKS, strict=True)]
    per_group = [x.shape == groups + core for x, core in zip(operands, cores, strict=True)]
    call = functools.partial(
        reference.paged_kv_compress,
        compress_ratio=static.compress_ratio,
        overlap=static.overlap,
        state_format=static.state_format,
        out_dtype=static.out_dtype,
    )
    for _ in groups:
        call = jax.vmap(call, in_axes=tuple(0 if mapped else None for mapped in per_group))
    return call(
        *(x if m else x.reshape(c) for x, m, c in zip(operands, per_group, cores, strict=True))
    )


def _map(axis_size: int, batched: Sequence[bool], operands: Sequence[Array]) -> list[Array]:
    """Turn a mapped axis, in front where ``batched``, into one more group dimension.

    The state is written, so an unmapped one is broadcast: a copy per index is what vmap means. An
    unmapped operand that is only read gets size 1 there, unless other groups already differ in it.
    """
    groups = operands[0].shape[int(batched[0]) : -_CORE_RANKS[0]]
    mapped = []
    for i, (x, is_batched, rank) in enumerate(zip(operands, batched, _CORE_RANKS, strict=True)):
        if not is_batched:
            x = x[None]
        if i < _NUM_STATE or math.prod(x.shape[:-rank]) != 1:
            x = jnp.broadcast_to(x, (axis_size, *groups, *x.shape[-rank:]))
        mapped.append(x)
    return mapped


def _vary_alike(operands: Sequence[Array]) -> list[Array]:
    """Inside ``shard_map``, make every operand vary over the axes that any of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(axes - own), to="varying") if axes - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


@functools.cache
def decode(static: Decode) -> Callable[..., tuple[Array, Array, Array]]:
    """The operation on ``[*G, ...]`` operands -> (kv, score, kv_comp)."""
    compiled = functools.partial(_call_ffi, static)
    plain = functools.partial(_call_reference, static)

    def implementation(*operands):
        operands = _vary_alike(operands)
        match static.implementation:
            case "xla":
                return plain(*operands)
            case "ffi":
                return jax.lax.platform_dependent(*operands, cpu=compiled, cuda=compiled)
            case _:
                on_cuda = compiled if HAS_CUDA else plain
                return jax.lax.platform_dependent(
                    *operands, cpu=compiled, cuda=on_cuda, default=plain
                )

    call = jax.custom_batching.custom_vmap(
        _mesh.over_groups(implementation, tuple(_CORES), _CORE_RANKS[0])
    )

    @call.def_vmap
    def _(axis_size, batched, *operands):
        return call(*_map(axis_size, batched, operands)), (True, True, True)

    @jax.custom_jvp
    def operation(*operands):
        return call(*operands)

    @operation.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "paged_kv_compress has no derivative: it updates a cache, for inference only. "
            "Put jax.lax.stop_gradient around its operands"
        )

    return operation
