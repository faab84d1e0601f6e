"""Compiles a decode step for two H200s on a machine without one; prints the compiled programs.

Run by test_lowering.py, in a process of its own: it starts JAX's CUDA plugin.
"""

import functools

import cases
import jax
import numpy as np
from checks import STATE, step_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SEPARATOR = "==== "
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""


def compiled_text(mesh, groups=None):
    case = cases.MAPPED
    sharding = NamedSharding(mesh, P() if groups is None else P("data"))
    leading = () if groups is None else (groups,)
    arrays = [
        jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding)
        for x in cases.make_operands(case).astuple()
    ]
    step = step_of(case, "ffi")
    step = step if groups is None else jax.vmap(step)
    return jax.jit(step, donate_argnums=STATE).lower(*arrays).compile().as_text()


def main():
    jax.devices("cpu")  # finds the plugins
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x2", target_config=H200
    ).devices
    programs = {"one device": lambda: compiled_text(Mesh(np.array(devices[:1]), ("data",)))}
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(devices), ("data",), axis_types=(axis_type,))
        programs[f"{axis_type.name} mesh"] = functools.partial(compiled_text, mesh, 2)
    for name, text in programs.items():
        print(SEPARATOR + name)
        print(text())


if __name__ == "__main__":
    main()
