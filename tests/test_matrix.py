"""Every mode of JAX, on every kind of mesh, with operands in every place, in every form of program.

Groups of requests, vmapped; donated. The values are those of one device in no mode, each device
works on its share of the state in place, and nothing is sent between devices.
"""

import contextlib

import cases
import jax
import numpy as np
import pytest
from checks import COLLECTIVE, STATE, Results, check_results, step_of
from jax.sharding import AxisType, NamedSharding
from test_mesh import cpus, grouped, grouped_operands, one_device_results, specs

GROUPS = 8
MODES = {
    "no mode": {},
    "rank promotion raises": {"jax_numpy_rank_promotion": "raise"},
    "strict dtypes": {"jax_numpy_dtype_promotion": "strict"},
    "x64": {"jax_enable_x64": True},
    "strict dtypes, x64": {"jax_numpy_dtype_promotion": "strict", "jax_enable_x64": True},
    "debug nans": {"jax_debug_nans": True},
    "tracer leaks": {"jax_check_tracer_leaks": True},
}
MESHES = {
    "no mesh": None,
    "auto": AxisType.Auto,
    "explicit": AxisType.Explicit,
}


@contextlib.contextmanager
def in_mode(mode):
    before = {name: getattr(jax.config, name) for name in MODES[mode]}
    try:
        for name, value in MODES[mode].items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def program_of(form, step, sharding):
    if form == "vmap of jit":
        return jax.jit(grouped(jax.jit(step), 1), donate_argnums=STATE)
    if form == "jit":
        return jax.jit(grouped(step, 1), donate_argnums=STATE)
    shardings = (
        {} if sharding is None else {"in_shardings": sharding, "out_shardings": sharding[STATE[0]]}
    )
    return jax.jit(grouped(step, 1), donate_argnums=STATE, **shardings)


@pytest.mark.parametrize("form", ("jit", "vmap of jit", "shardings of jit"))
@pytest.mark.parametrize("place", ("placed", "unplaced", "abstract"))
@pytest.mark.parametrize("devices", (1, GROUPS))
@pytest.mark.parametrize("mesh_type", MESHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", cases.in_formats([cases.MAPPED]), ids=str)
def test_matrix(case, mode, mesh_type, devices, place, form):
    check(case, mode, mesh_type, cpus()[:devices], place, form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("jit", "vmap of jit", "shardings of jit"))
@pytest.mark.parametrize("place", ("placed", "unplaced", "abstract"))
@pytest.mark.parametrize("mesh_type", MESHES)
@pytest.mark.parametrize("case", cases.in_formats([cases.MAPPED]), ids=str)
def test_two_gpus(case, mesh_type, place, form, gpu):
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two GPUs")
    check(case, "no mode", mesh_type, devices[:2], place, form)


def check(case, mode, mesh_type, devices, place, form):
    axis_type = MESHES[mesh_type] or AxisType.Auto
    mesh = jax.make_mesh((len(devices),), ("a",), axis_types=(axis_type,), devices=devices)
    sharding = tuple(NamedSharding(mesh, spec) for spec in specs("a"))
    arrays = grouped_operands(case, GROUPS)
    want = one_device_results(case, GROUPS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_mode(mode))
        if MESHES[mesh_type] is not None:
            stack.enter_context(jax.set_mesh(mesh))
        placed = [jax.device_put(x, s) for x, s in zip(arrays, sharding, strict=True)]
        program = program_of(form, step_of(case, None), sharding)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        if place == "placed":
            given, lowered = placed, program.lower(*placed)
        elif place == "unplaced":
            given, lowered = arrays, program.lower(*arrays)
        else:
            if form != "shardings of jit":
                shapes = [x.update(sharding=s) for x, s in zip(shapes, sharding, strict=True)]
            given, lowered = placed, program.lower(*shapes)
        compiled = lowered.compile()
        split = len(devices) if place != "unplaced" or form == "shardings of jit" else 1
        share = sum(arrays[i].nbytes for i in STATE) // split
        memory = compiled.memory_analysis()
        assert not COLLECTIVE.findall(compiled.as_text())
        if mode != "debug nans":  # in which JAX donates nothing
            assert memory.alias_size_in_bytes == share
        assert memory.temp_size_in_bytes < share / 4
        # A compiled program asks for operands where they are to be; the other one places them.
        results = (program if place == "unplaced" else compiled)(*given)
        check_results(Results(*map(np.asarray, results)), want, case.state_format)
