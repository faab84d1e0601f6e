"""Programs that outlive their process: jax.export, and the persistent compilation cache."""

import pathlib
import subprocess
import sys

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Results, arguments, check_results, expected_results

from jax_dsv4 import EXPORT_DISABLED_CHECKS, CompressorState, init_state, paged_kv_compress
from jax_dsv4.decode import DECODE

# Serialized by jax 0.10.2, the oldest supported: `python tests/test_export.py` writes it.
OLDEST = pathlib.Path(__file__).parent / "exported_by_jax_0.10.2.bin"


def step(kv_score, state, block_tables, kv_lens):
    return paged_kv_compress(
        kv_score, None, state, block_tables, kv_lens, compress_ratio=4, implementation="ffi"
    )


def export(platforms=("cpu", "cuda"), checks=EXPORT_DISABLED_CHECKS, state_format="raw"):
    """For any batch."""
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.export.export(jax.jit(step), platforms=platforms, disabled_checks=checks)(
        jax.ShapeDtypeStruct((batch, 4, 512), jnp.bfloat16),
        jax.eval_shape(
            lambda: init_state(6, 8, head_dim=128, compress_ratio=4, format=state_format)
        ),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def check_artefact(blob, batch, state_format="raw"):
    loaded = jax.export.deserialize(blob)
    case = cases.Case(
        *(128, 4, 4, cases.DTypes("bfloat16", "float32", "bfloat16"), "no_ape", 3),
        state_format=state_format,
    )
    operands = cases.make_operands(case)
    operands.kv_score = operands.kv_score[:batch]
    operands.kv, operands.score = operands.kv[:6, :8], operands.score[:6, :8]
    operands.kv_tables = operands.score_tables = np.arange(2 * batch, dtype=np.int32).reshape(-1, 2)
    operands.kv_lens = np.array([4, 9, 12], np.int32)[:batch]
    kv_score, _, kv, score, tables, _, kv_lens, _ = arguments(operands, jax.devices("cpu")[0])
    kv_comp, state = loaded.call(
        kv_score, CompressorState(kv, score, state_format), tables, kv_lens
    )
    got = Results(*map(np.asarray, (state.kv, state.score, kv_comp)))
    check_results(got, expected_results(case, operands), state_format)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")], ids=" and ".join)
def test_an_exported_step_serves_any_batch(platforms, batch):
    check_artefact(bytes(export(platforms).serialize()), batch)


def test_an_exported_step_serves_the_format_that_it_was_traced_for():
    blob = bytes(export(state_format="prefix").serialize())
    check_artefact(blob, 3, "prefix")
    with pytest.raises(ValueError, match="raw"):
        check_artefact(blob, 3, "raw")


def test_an_artefact_for_cuda_holds_the_call():
    exported = export(("cuda",))
    assert exported.platforms == ("cuda",)
    assert f"custom_call @{DECODE.target}" in exported.mlir_module()


def test_bytes_of_the_oldest_jax_still_run():
    check_artefact(OLDEST.read_bytes(), 3)


def test_export_needs_the_exemption():
    with pytest.raises(ValueError, match=DECODE.target):
        export(checks=())


def test_a_fresh_process_loads_and_runs_it(tmp_path):
    path = tmp_path / "step.bin"
    path.write_bytes(export().serialize())
    code = """
import sys, jax, jax_dsv4, jax.numpy as jnp
step = jax.export.deserialize(open(sys.argv[1], "rb").read())
state = jax_dsv4.init_state(6, 8, head_dim=128, compress_ratio=4)
tables = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
kv_comp, state = step.call(jnp.ones((2, 4, 512), jnp.bfloat16), state, tables, jnp.array([4, 3]))
print(float(kv_comp[0, 0, 0]), float(kv_comp[1, 0, 0]), float(state.kv.sum()))
"""
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment
    )
    assert run.stdout.split() == ["1.0", "0.0", f"{7 * 256.0}"], run.stderr


def test_a_second_process_finds_the_program_in_the_persistent_cache(tmp_path):
    code = """
import jax, jax.monitoring, jax.numpy as jnp, jax_dsv4
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
state = jax_dsv4.init_state(6, 8, head_dim=128, compress_ratio=4)
operands = jnp.ones((2, 4, 512)), None, state, jnp.zeros((2, 2), jnp.int32), jnp.array([0, 3])
jax.block_until_ready(operands)
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
step = jax.jit(jax_dsv4.paged_kv_compress, static_argnames="compress_ratio")
jax.block_until_ready(step(*operands, compress_ratio=4))
print(events.count("/jax/compilation_cache/cache_hits"))
"""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "PATH": "",
    }
    hits = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0, run.stderr
        hits.append(int(run.stdout))
    assert hits == [0, 1]


if __name__ == "__main__":
    assert jax.__version__ == "0.10.2"
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")  # no folders of ours
    OLDEST.write_bytes(export().serialize())
