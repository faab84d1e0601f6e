"""Caches as pytrees: arrays that are updated, and static fields that say what they mean."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.export

_T = TypeVar("_T", bound=type)


def register_tuple(cls: _T) -> _T:
    """A decorator that makes a named tuple one that ``jax.export`` can serialize."""
    if (earlier := _before_reload(cls)) is not None:
        return earlier
    jax.export.register_namedtuple_serialization(cls, serialized_name=f"jax_dsv4.{cls.__name__}")
    return cls


def _before_reload(cls: _T) -> _T | None:
    return vars(sys.modules[cls.__module__]).get(cls.__name__)


def register(
    arrays: Sequence[str], leaf_names: Callable[[Any], Sequence[str]]
) -> Callable[[_T], _T]:
    """A decorator that makes a dataclass a pytree, which ``jax.export`` can serialize.

    The fields ``arrays`` come first in the class, and are the children; all others are static.
    ``leaf_names`` gives the children's names in a tree. They should tell apart what must not be
    mixed up: a checkpoint holds leaves under their names, and nothing that is static.

    JAX knows a type by its object. So where a module is reloaded, the first class stays.
    """

    def decorate(cls: _T) -> _T:
        if (earlier := _before_reload(cls)) is not None:
            return earlier
        static = [field.name for field in dataclasses.fields(cls) if field.name not in arrays]

        def flatten(cache: Any):
            children = tuple(getattr(cache, name) for name in arrays)
            return children, tuple(getattr(cache, name) for name in static)

        def flatten_with_keys(cache: Any):
            children, aux = flatten(cache)
            keys = map(jax.tree_util.GetAttrKey, leaf_names(cache))
            return tuple(zip(keys, children, strict=True)), aux

        def unflatten(aux: Sequence[Any], children: Iterable[Any]) -> Any:
            return cls(*children, *aux)

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jax_dsv4.{cls.__name__}",
            serialize_auxdata=lambda aux: json.dumps(aux).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(data)),
        )
        return cls

    return decorate
