"""Importing the package, and its small helpers."""

import os
import pathlib
import shutil
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_dsv4
from jax_dsv4 import CompressorState, _config, _cpu, _ffi, init_state


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# Without the hook of `pip install -e .`, which would find the real package first.
IN_THIS_FOLDER = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, "")
import jax_dsv4
"""


@pytest.fixture
def source_folder(tmp_path):
    """A folder with the package's Python files, and no compiled module."""
    (tmp_path / "jax_dsv4").mkdir()
    source = pathlib.Path(jax_dsv4.__file__).parent
    for file in source.rglob("*.py"):
        (target := tmp_path / "jax_dsv4" / file.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return tmp_path


def test_importing_starts_no_backend(tmp_path):
    code = "import jax, jax_dsv4; print('imported'); jax.devices()"
    result = python(code, tmp_path, JAX_PLATFORMS="none_such")
    assert result.stdout == "imported\n", result.stderr
    assert result.returncode != 0
    assert "none_such" in result.stderr


def test_importing_without_compiled_modules_says_what_to_do(source_folder):
    result = python(IN_THIS_FOLDER, source_folder)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: jax_dsv4 was imported from a folder without its")
    assert str(source_folder / "jax_dsv4") in message
    assert "pip install -e ." in message


@pytest.mark.parametrize("broken", ("_cpu", "_cuda"))
def test_a_broken_compiled_module_is_not_taken_for_a_missing_one(broken, source_folder):
    shutil.copy(find_spec("jax_dsv4._cpu").origin, source_folder / "jax_dsv4")
    assert python(IN_THIS_FOLDER, source_folder).returncode == 0
    for module in (source_folder / "jax_dsv4").glob(f"{broken}.*"):
        module.unlink()
    (source_folder / "jax_dsv4" / f"{broken}.py").write_text("raise ImportError('no libfoo')")
    result = python(IN_THIS_FOLDER, source_folder)
    assert result.stderr.strip().endswith("ImportError: no libfoo")


def test_the_built_module_fits_the_running_jaxlib():
    assert _ffi._running_ffi_version() >= _cpu.FFI_VERSION


@pytest.mark.parametrize("built", [(0, 10_000), (10_000, 0)])
def test_a_module_built_for_a_newer_ffi_is_refused_before_it_is_registered(built, monkeypatch):
    monkeypatch.setattr(_cpu, "FFI_VERSION", built)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: pytest.fail("registered"))
    with pytest.raises(ImportError, match=rf"XLA FFI {built[0]}\.{built[1]}.*upgrade jax") as error:
        _ffi._load("_cpu", "cpu")
    assert "{}.{}".format(*_ffi._running_ffi_version()) in str(error.value)


@pytest.mark.parametrize("layers", (None, 3))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("kind", _config.KINDS, ids=str)
def test_an_initial_state_weighs_nothing(kind, dtype, layers):
    sizes = dict(zip(kind._fields, kind, strict=True)) | {"layers": layers}
    state = init_state(3, 8, **sizes, dtype=dtype)
    shape = (3, 8, kind.head_dim * (2 if kind.overlap else 1))
    shape = shape if layers is None else (layers, *shape)
    for array, value in ((state.kv, 0), (state.score, -np.inf)):
        assert (array.shape, array.dtype) == (shape, dtype)
        np.testing.assert_array_equal(np.asarray(array, np.float32), value)
    assert state.format == "raw"
    if dtype == jnp.float32:
        prefixes = init_state(3, 8, **sizes, format="prefix")
        assert prefixes.format == "prefix"
        np.testing.assert_array_equal(prefixes.kv, state.kv)
        np.testing.assert_array_equal(prefixes.score, state.score)


def test_a_state_is_a_pytree_with_a_static_format():
    state = init_state(1, 2, head_dim=8, compress_ratio=4)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(1, 2, 16)] * 2
    doubled = jax.tree.map(lambda x: x + x, state)
    assert isinstance(doubled, CompressorState)
    other = CompressorState(state.kv, state.score, "another")
    assert jax.tree.structure(other) != jax.tree.structure(state)
    assert jax.jit(lambda x: x)(other).format == "another"
