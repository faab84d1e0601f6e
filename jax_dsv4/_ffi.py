"""The extension modules: loading them, the version they need, and registering their handlers."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
import sys
import warnings
from types import ModuleType
from typing import Any

import jax

from jax_dsv4 import _cpu


def _running_ffi_version() -> tuple[int, int]:
    path = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        header = path.read_text()
        major, minor = (
            int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1])  # pyright: ignore[reportOptionalSubscript]
            for part in ("MAJOR", "MINOR")
        )
    except (OSError, UnicodeError, TypeError) as error:
        raise ImportError(
            f"jax_dsv4 reads the XLA FFI version of the installed jaxlib from its headers, and "
            f"{path} does not say it: reinstall jaxlib (pip install --force-reinstall --no-deps "
            "jaxlib)"
        ) from error
    return major, minor


def _load(name: str, platform: str) -> ModuleType | None:
    """Import an extension module and register its handlers; ``None`` if it was not built.

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
    for target, handler in module.HANDLERS.items():
        jax.ffi.register_ffi_target(target, handler, platform=platform)
    return module


_load("_cpu", "cpu")
TARGETS = tuple(_cpu.HANDLERS)  # the same on every platform
PLATFORMS = ("cpu", "cuda")
HAS_CUDA = _load("_cuda", "CUDA") is not None


def has_kernel(target: str, platform: str, implementation: Any) -> bool:
    """Whether a call becomes the kernel on a platform.

    Warns where it becomes the reference because this package was built without CUDA, and raises
    ``RuntimeError`` where that runs here and the kernel was asked for.
    """
    if target not in TARGETS or platform not in PLATFORMS:
        return False
    if platform == "cpu" or HAS_CUDA:
        return True
    runs_here = jax.default_backend() == "gpu"  # or it is lowered for another machine
    problem = "jax_dsv4 was built without a CUDA compiler"
    remedy = "see the troubleshooting page of its docs"
    if implementation is not None:
        if runs_here:
            raise RuntimeError(f"implementation={implementation!r}: {problem}; {remedy}")
        return True
    if not runs_here:
        remedy = "implementation='ffi' makes a program that needs the kernel"
    warning = f"{problem}: on a GPU, the slow jnp reference runs; {remedy}"
    if sys.version_info >= (3, 12):  # at the user's line
        skipped = tuple(str(pathlib.Path(f).parent) for f in (jax.__file__, __file__))
        warnings.warn(warning, skip_file_prefixes=skipped)
    else:
        warnings.warn(warning, stacklevel=2)
    return False
