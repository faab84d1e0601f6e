"""The CPU's kernels have the same bits at every level of instructions, on any number of threads.

python tests/test_cpu_bits.py  # prints a digest of every result
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import cases
import jax
import numpy as np
import pytest
import ragged_batches
import test_compressor
from checks import bits, run

from jax_dsv4 import _cpu, decode_records, dequantize_records, live

CPU = jax.devices("cpu")[0]
STEPS = tuple(
    cases.case_of(kind, 4, dtypes, regime, batch=batch)
    for kind in cases.KINDS
    for dtypes in (cases.BF16_IN_F32_STATE, cases.F32_IN_BF16_STATE)
    for regime, batch in (("no_ape", 1), ("boundaries", 2), ("non_finite", 14))
)


def decode_steps() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Few requests come in parts of their rows or channels, if there are several threads."""
    for case in cases.in_formats(STEPS):
        yield str(case), list(run(case, cases.make_operands(case), "ffi", CPU))


def ragged_calls() -> Iterator[tuple[str, list[np.ndarray]]]:
    dtypes = cases.BF16_IN_F32_STATE
    for sizes in ragged_batches.SIZES:
        for state_format in ("raw", "prefix"):
            for rule in ("all", live(max_rewind=3)):
                batch = ragged_batches.make_batch(sizes, dtypes, "mixed")
                results = ragged_batches.run(batch, sizes.kind, dtypes, state_format, rule, "ffi")
                yield f"{sizes.kind} {state_format} {rule}", list(results)


def records() -> Iterator[tuple[str, list[np.ndarray]]]:
    step = jax.jit(decode_records)
    for name in test_compressor.KINDS:
        compressor = test_compressor.make_compressor(name)
        cache, tables = test_compressor.make_cache(name)
        for requests in (slice(1, 2), slice(None)):
            own = jax.tree.map(lambda x, requests=requests: x[requests], tables)
            lens = test_compressor.LENS[requests]
            cache = step(test_compressor.make_rows(name)[requests], compressor, cache, own, lens)
        slots = np.arange(cache.records.pool.shape[0] * cache.records.page_size, dtype=np.int32)
        read = dequantize_records(cache.records, slots)
        yield name, [np.asarray(x) for x in (*jax.tree.leaves(cache), read)]


def digests() -> dict[str, str]:
    def digest(array: np.ndarray) -> bytes:
        return (bits(array) if array.dtype.kind == "f" or array.itemsize == 2 else array).tobytes()

    with jax.default_device(CPU):
        return {
            name: hashlib.sha256(b"".join(map(digest, arrays))).hexdigest()[:16]
            for results in (decode_steps(), ragged_calls(), records())
            for name, arrays in results
        }


@pytest.fixture(scope="module")
def of_the_best_level() -> dict[str, str]:
    return digests()


@pytest.mark.parametrize("level", _cpu.VECTOR_LEVELS[:-1])
def test_every_level_gives_the_same_bits(level, of_the_best_level):
    _cpu.set_vector_level(_cpu.VECTOR_LEVELS.index(level))
    try:
        assert digests() == of_the_best_level
    finally:
        _cpu.set_vector_level(len(_cpu.VECTOR_LEVELS) - 1)


@pytest.mark.parametrize("num_threads", (1, 2, 16))
def test_any_number_of_threads_gives_the_same_bits(num_threads, of_the_best_level):
    environment = os.environ | {"NPROC": str(num_threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout) == of_the_best_level


if __name__ == "__main__":
    print(json.dumps(digests()))
