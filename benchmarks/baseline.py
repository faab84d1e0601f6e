"""The row-at-a-time reduction (``baseline.cuh``) as a kernel for ``paged_kv_compress``.

    python benchmarks/baseline.py

It is built here, by one call of nvcc, and is no part of the package: ``decode.py`` measures it
beside the shipped kernel. Run by itself, this checks it against the jnp reference.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import CompressorState, paged_kv_compress
from jax_dsv4._op import Kernel

HERE = pathlib.Path(__file__).parent
TARGET = "jax_dsv4_row_at_a_time"
WARPS = (1, 4)  # by the index that the kernel takes as its geometry


def build(library: pathlib.Path, architecture: str = "native") -> None:
    """Compile for one architecture, as nvcc's ``-arch`` names it; native: the GPU at hand."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    options = ("-std=c++17", "-O3", "-DNDEBUG", f"-arch={architecture}", "-shared")
    includes = (f"-I{HERE.parent / 'ffi'}", "-isystem", jax.ffi.include_dir())
    source = HERE / "baseline.cu"
    subprocess.run(
        [nvcc, *options, "-Xcompiler", "-fPIC", *includes, str(source), "-o", str(library)],
        check=True,
    )


@functools.cache
def register() -> None:
    """Build it for the GPU at hand, and register its handler."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "baseline.so")
        build(path)
        library = ctypes.CDLL(str(path))  # stays loaded when its file is gone
    handler = jax.ffi.pycapsule(library.RowAtATimeCuda)
    jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")


def row_at_a_time(warps: int) -> Kernel:
    """The ``implementation`` of a call by so many warps.

    It serves what is measured: D 512, R 128, bf16 new rows on a raw f32 state, bf16 values.
    """
    register()
    return Kernel(TARGET, WARPS.index(warps))


def check(warps: int) -> None:
    """Raise ``AssertionError`` unless it computes what the jnp reference does.

    On requests whose windows are complete or not, some of which are inactive or have no pages.
    """
    batch, next_n, page_size, head_dim, ratio = 8, 4, 32, 512, 128
    rng = np.random.default_rng(warps)
    pages = rng.permutation(batch * 8 + 1)[:-1].astype(np.int32).reshape(batch, 8)
    pages[3, 2] = pages[5, 3] = -1
    kv_lens = np.array([128, 256, 130, 128, 127, 131, 0, 3], np.int32)
    shape = (batch * 8 + 1, page_size, head_dim)
    kv, score = rng.standard_normal((2, *shape), np.float32)
    kv_score = rng.standard_normal((batch, next_n, 2 * head_dim), np.float32).astype(jnp.bfloat16)
    ape = rng.standard_normal((ratio, head_dim), np.float32)

    def run(implementation):
        call = functools.partial(
            paged_kv_compress, compress_ratio=ratio, overlap=False, implementation=implementation
        )
        state = CompressorState(jnp.array(kv), jnp.array(score), "raw")
        kv_comp, state = jax.jit(call)(kv_score, ape, state, pages, kv_lens)
        return jax.tree.map(np.asarray, (kv_comp.astype(jnp.float32), state.kv, state.score))

    got, want = run(row_at_a_time(warps)), run("xla")
    np.testing.assert_allclose(got[0], want[0], rtol=2.0**-7, atol=1e-6)  # an ulp of bf16
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[2], want[2])
    assert np.any(got[0]), "nothing was emitted"


def main() -> None:
    for warps in WARPS:
        check(warps)
        print(f"row at a time, {warps} warps: as the reference")


if __name__ == "__main__":
    main()
