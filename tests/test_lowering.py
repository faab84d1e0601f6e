"""What the operation becomes on each platform, on a machine that has none of them."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import cases
import compile_for_cuda
import jax
import pytest
from checks import COLLECTIVE, STATE, step, step_of, with_or_without_cuda

from jax_dsv4 import _ffi
from jax_dsv4.compressor import decode_records_of
from jax_dsv4.decode import DECODE

CASE = cases.MAPPED


def lowered_text(step, *platforms, in_axes=None, case=CASE):
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cases.make_operands(case).astuple()]
    if in_axes is not None:
        arrays = [
            x if axis is None else jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
            for x, axis in zip(arrays, in_axes, strict=True)
        ]
    jitted = jax.jit(step, donate_argnums=STATE)
    return jitted.trace(*arrays).lower(lowering_platforms=platforms).as_text()


def calls(text):
    return [line for line in text.splitlines() if f"custom_call @{DECODE.target}" in line]


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
@pytest.mark.parametrize("case", cases.in_formats([CASE]), ids=str)
def test_the_call_names_its_attributes_and_aliases(case, platform):
    (call,) = calls(lowered_text(step_of(case, "ffi"), platform, case=case))
    kv_score, state, out = ({"bfloat16": 16, "float32": 11}[dtype] for dtype in case.dtypes)
    for attribute in (
        f"next_n = {CASE.next_n} : i64",
        f"compress_ratio = {CASE.ratio} : i64",
        f"overlap = {str(CASE.overlap).lower()}",
        "layer = -1 : i64",
        f"kv_score_dtype = {kv_score} : ui8",
        f"state_format = {('raw', 'prefix').index(case.state_format)} : ui8",
        f"state_dtype = {state} : ui8",
        f"out_dtype = {out} : ui8",
    ):
        assert attribute in call
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", call)
    assert aliases == [("1", "3"), ("2", "4")]


def test_the_donated_state_is_aliased_by_the_program():
    text = lowered_text(step_of(CASE, "ffi"), "cuda")
    assert set(re.findall(r"%arg(\d+): [^%]*tf.aliasing_output", text)) == {str(i) for i in STATE}


def test_a_vmapped_operation_is_one_call_with_a_group_dimension():
    in_axes = (0, None, 0, 0, None, None, 0, None)
    text = lowered_text(jax.vmap(step_of(CASE, "ffi"), in_axes), "cuda", in_axes=in_axes)
    (call,) = calls(text)
    pool = f"tensor<3x{CASE.num_pages}x{CASE.page_size}x{CASE.state_dim}xbf16>"
    assert call.count(pool) == 4  # in and out
    assert f"tensor<1x{CASE.ratio}x{CASE.state_dim}xf32>" in call  # ape, shared by the groups


@pytest.mark.parametrize("platform", ("tpu", "rocm"))
def test_platforms_without_a_kernel_get_the_reference(platform):
    text = lowered_text(step_of(CASE), platform)
    assert not calls(text)
    assert "stablehlo.scatter" in text


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
def test_the_reference_can_be_asked_for(platform):
    assert not calls(lowered_text(step_of(CASE, "xla"), platform))


@pytest.fixture
def nothing_traced():
    """Before the test, and after it: what a program becomes depends on ``HAS_CUDA``."""
    step.cache_clear()
    yield
    step.cache_clear()


@with_or_without_cuda
@pytest.mark.parametrize("has_cuda", (True, False))
def test_cuda_gets_the_kernel_where_it_was_built(has_cuda, monkeypatch, nothing_traced):
    monkeypatch.setattr(_ffi, "HAS_CUDA", has_cuda)
    text = lowered_text(step_of(CASE), "cuda")
    assert len(calls(text)) == has_cuda


def test_on_a_gpu_without_the_cuda_module_a_warning_or_an_error(monkeypatch, nothing_traced):
    monkeypatch.setattr(_ffi, "HAS_CUDA", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(
        UserWarning, match="built without a CUDA compiler: on a GPU, the slow"
    ) as seen:
        assert not calls(lowered_text(step_of(CASE), "cuda"))
    assert sys.version_info < (3, 12) or seen[0].filename == __file__
    with pytest.raises(RuntimeError, match=r"implementation='ffi': .* without a CUDA compiler"):
        lowered_text(step_of(CASE, "ffi"), "cuda")
    assert calls(lowered_text(step_of(CASE), "cpu"))


@pytest.mark.parametrize("platform", ("tpu", "rocm"))
def test_asking_for_the_kernel_where_there_is_none_raises(platform):
    with pytest.raises(NotImplementedError, match=platform):
        lowered_text(step_of(CASE, "ffi"), platform)


def test_only_platforms_without_the_kernel_are_named():
    with pytest.raises(NotImplementedError, match=r"is not there on tpu$"):
        lowered_text(step_of(CASE, "ffi"), "cpu", "tpu")


def test_a_build_without_cuda_tells_of_the_reference_in_a_program_for_cuda(
    monkeypatch, nothing_traced
):
    monkeypatch.setattr(_ffi, "HAS_CUDA", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.warns(UserWarning, match="the slow jnp reference runs; implementation='ffi'"):
        assert not calls(lowered_text(step_of(CASE), "cuda"))
    assert calls(lowered_text(step_of(CASE, "ffi"), "cuda"))


def test_one_program_can_serve_several_platforms():
    text = lowered_text(step_of(CASE), "cpu", "tpu")
    assert len(calls(text)) == 1
    assert "stablehlo.scatter" in text


def test_it_compiles_for_cuda_ahead_of_time():
    """For two H200s, on one device and over meshes of both types of axis; and a layer's records."""
    if not _ffi.HAS_CUDA or importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the CUDA module, and JAX's plugin jax-cuda13-plugin; no GPU")
    script = pathlib.Path(__file__).parent / "compile_for_cuda.py"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    _, layer, *programs = result.stdout.split(compile_for_cuda.SEPARATOR)
    assert layer.count(f'custom_call_target="{decode_records_of(2, False).target}"') == 1
    assert len(re.findall(r"\{\d\}: \(\d+, \{\}, may-alias\)", layer)) == 6
    assert not re.search(r"copy|fusion|slice", layer)
    assert len(programs) == 3
    for program in programs:
        assert program.count(f'custom_call_target="{DECODE.target}"') == 1
        aliases = re.findall(r"\{(\d)\}: \((\d), \{\}, may-alias\)", program)
        assert aliases == [("0", "2"), ("1", "3")]
        assert not COLLECTIVE.search(program) and "copy" not in program
