"""Checks of what users pass: each returns it in one form, or names it in an error."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_dsv4 import _config

FLOATS, I32 = ("bfloat16", "float32"), ("int32",)
IMPLEMENTATIONS = (None, "ffi", "xla")
_INT32_MAX = 2**31 - 1


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def index(name: str, value: Any) -> int:
    """A static integer, NumPy's too, as Python's."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: expected a static integer, got an array of JAX, {value.aval}; inside jit, "
            f'name it in static_argnames: jax.jit(f, static_argnames="{name}")'
        )
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError("a truth value")
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from error


def integer(name: str, value: Any, minimum: int, maximum: int = _INT32_MAX) -> int:
    """A static integer of this range."""
    got = index(name, value)
    if not minimum <= got <= maximum:
        raise ValueError(f"{name}: expected at least {minimum}, at most {maximum}, got {got}")
    return got


def array_size(names: str, shape: Sequence[int], dtype: DTypeLike) -> None:
    """Raise ``ValueError`` where XLA would abort: an array of 2**63 bytes or more."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    if size >= 2**63:
        raise ValueError(f"{names}: expected an array of less than 2**63 bytes, got {size}")


def ratio_and_overlap(compress_ratio: Any, overlap: Any) -> tuple[int, bool]:
    """Both static; an ``overlap`` of ``None`` is the ratio's: 4 overlaps, others do not."""
    expected = f"compress_ratio: expected one of {_config.RATIOS}, got {compress_ratio!r}"
    try:
        ratio = index("compress_ratio", compress_ratio)
    except TypeError as error:
        if isinstance(compress_ratio, jax.Array):
            raise
        raise ValueError(expected) from error
    if ratio not in _config.RATIOS:
        raise ValueError(expected)
    if overlap is None:
        return ratio, ratio == 4
    if not isinstance(overlap, (bool, jnp.bool_)):
        raise TypeError(f"overlap: expected True, False or None, got {overlap!r}")
    return ratio, bool(overlap)


def floating(name: str, dtype: DTypeLike) -> str:
    """The name of a type, one of ``FLOATS``."""
    try:
        got = jnp.dtype(dtype).name
    except TypeError:
        got = repr(dtype)
    if got not in FLOATS:
        raise TypeError(f"{name}: expected {' or '.join(FLOATS)}, got {got}")
    return got


def array(name: str, x: Any, dtypes: Sequence[str], *shape: int | str) -> Array:
    """``x`` as an array of one of ``dtypes`` and this shape; a string: a dimension of any size."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError(f"{name}: expected an array, got a ShapeDtypeStruct; use jax.eval_shape")
    if isinstance(x, jax.Ref):
        raise TypeError(f"{name}: expected an array, got a reference; read it: ref[...]")
    try:
        given = x
        if not (hasattr(x, "dtype") and hasattr(x, "shape")):
            # Python's numbers are of 32 bits in either mode; not so arrays among them.
            wrong = [leaf for leaf in jax.tree.leaves(x) if _is_array_but_of(leaf, dtypes)]
            with jax.enable_x64(False):
                given = wrong[0] if wrong else jnp.asarray(x)
            if not (wrong or given.dtype.name in dtypes or given.size):
                given = given.astype(dtypes[0])  # an empty list has no number that says its type
        dtype = _dtype_name(given.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}: {error}"
        ) from error
    if dtype not in dtypes:
        cast = ""
        if "int32" in dtypes and dtype in ("int64", "uint32"):
            cast = f"; cast it yourself: {name}.astype(jnp.int32)"
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {dtype}{cast}")
    fits = len(given.shape) == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(given.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(given.shape)}")
    try:
        checked = given if isinstance(given, jax.Array) else jnp.asarray(given)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}: {error}"
        ) from error
    space = jax.typeof(checked).memory_space
    if space != jax.memory.Space.Device:
        raise ValueError(
            f"{name}: expected an array in the device's memory, got one in {space.name.lower()} "
            "memory; move it: jax.device_put(x, jax.memory.Space.Device)"
        )
    return checked


def absent(dtype: DTypeLike, *shape: int) -> Array:
    """An operand that is not there: of no rows of this shape.

    NumPy's: JAX's would be a dispatch of its own in an eager call, longer than the call.
    """
    return cast(Array, np.zeros((0, *shape), dtype))


def optional(name: str, x: Any, dtypes: Sequence[str], *shape: int) -> Array:
    """``array``; of ``None``, an absent one."""
    if x is None:
        return absent(dtypes[0], *shape[1:])
    return array(name, x, dtypes, *shape)


def _is_array_but_of(x: Any, dtypes: Sequence[str]) -> bool:
    return hasattr(x, "dtype") and _dtype_name(x.dtype) not in dtypes


def _dtype_name(dtype: Any) -> str:
    """The name of an array's element type, before JAX makes 32 bits of NumPy's 64."""
    name = getattr(dtype, "name", None)
    if name is None:
        raise TypeError(f"an element type {dtype!r} that is not NumPy's")
    return name if getattr(dtype, "isnative", True) else f"{name} in foreign byte order"


def state_dtype(name: str, format: str, dtype: DTypeLike) -> None:
    """Raise ``TypeError`` unless a state of this format may have this dtype."""
    got, allowed = floating(name, dtype), _config.STATE_DTYPES[format]
    if got not in allowed:
        raise TypeError(
            f"{name}: expected {' or '.join(allowed)} in state format {format!r}, got {got}: "
            "rounded to less than float32 at each of its rows, a prefix drifts"
        )


def layer(value: Any, num_layers: Any) -> tuple[int, Array]:
    """(index, [0]) of a layer that is known; (-1, [1]) of one that is on the device.

    A Python index out of range goes to the device, too, and reaches nothing.
    """
    if value is None:
        return -1, absent(jnp.int32)
    if isinstance(value, jax.Array):
        return -1, array("layer", value, I32).reshape(1)
    got = index("layer", value)
    if isinstance(num_layers, int):
        if 0 <= got < num_layers:
            return got, absent(jnp.int32)
        got = -1
    # How many there are is not known when a call of a symbolic number is traced.
    return -1, jnp.full(1, got if 0 <= got <= _INT32_MAX else -1, jnp.int32)


def ragged_batch(kv_lens: Any, cu_q_lens: Any, num_seqs: Any) -> tuple[Array, Array, Array]:
    """What says whose the rows of a ragged batch are, as operands: [B], [B + 1]; [1], or [0]."""
    kv_lens = array("kv_lens", kv_lens, I32, "B")
    cu_q_lens = array("cu_q_lens", cu_q_lens, I32, kv_lens.shape[0] + 1)
    if num_seqs is None:
        return kv_lens, cu_q_lens, absent(jnp.int32)
    return kv_lens, cu_q_lens, array("num_seqs", num_seqs, I32).reshape(1)
