"""Compiles decode steps for two H200s on a machine without one; prints the compiled programs.

Run by test_lowering.py, in a process of its own: it starts JAX's CUDA plugin.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
from checks import STATE, step_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_dsv4 import (
    CacheTables,
    Compressor,
    CompressorCache,
    decode_records,
    init_records,
    init_state,
)

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


def layer_operands():
    """Of ``decode_records``, for a layer's two compressors, whose new rows are one array."""
    batch, rows, compressors, caches, tables = 3, 0, [], [], []
    for head_dim, format in ((512, "fp8_ds_mla"), (128, "fp8_block128")):
        f32, i32 = jnp.float32, jnp.int32
        ape, weight = jnp.zeros((4, 2 * head_dim), f32), jnp.zeros(head_dim, f32)
        compressors.append(Compressor(ape, weight, jnp.zeros((64, 64), f32), head_dim, 4))
        state = init_state(9, 8, head_dim=head_dim, compress_ratio=4)
        caches.append(CompressorCache(state, init_records(6, 8, head_dim=head_dim, format=format)))
        tables.append(CacheTables(jnp.zeros((batch, 3), i32), jnp.zeros((batch, 2), i32)))
        rows += 4 * head_dim
    kv_score, kv_lens = jnp.zeros((batch, 2, rows), jnp.bfloat16), jnp.zeros(batch, i32)
    return kv_score, tuple(compressors), tuple(caches), tuple(tables), kv_lens


def compiled_layer(mesh):
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
        jax.eval_shape(layer_operands),
    )
    step = functools.partial(decode_records, implementation="ffi")
    return jax.jit(step, donate_argnums=2).lower(*operands).compile().as_text()


def main():
    jax.devices("cpu")  # finds the plugins
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology="1x1x2", target_config=H200
    ).devices
    one = Mesh(np.array(devices[:1]), ("data",))
    programs = {"layer": lambda: compiled_layer(one), "one device": lambda: compiled_text(one)}
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(devices), ("data",), axis_types=(axis_type,))
        programs[f"{axis_type.name} mesh"] = functools.partial(compiled_text, mesh, 2)
    for name, text in programs.items():
        print(SEPARATOR + name)
        print(text())


if __name__ == "__main__":
    main()
