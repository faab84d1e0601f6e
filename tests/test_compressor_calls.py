"""The custom call of a decode step that ends in records, unwrapped: what is wrong with it is named.

What it shares with the calls of its two parts is tested there (test_errors.py,
test_records_calls.py); here, that it checks all of that too, for each of its compressors.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import BF16, F32, OTHER_SHAPES
from test_records_calls import format_of

from jax_dsv4.compressor import decode_records_of
from jax_dsv4.records import RECORD_FORMATS

G, B, N, R, D, S = 2, 3, 3, 4, 128, 256
PAGES, PAGE_SIZE = 4, 5
POOLS, POOL = (G, 5, 8, S), (G, PAGES, PAGE_SIZE * (D + 4))
LAYER_POOLS, LAYER_POOL = (G, 3, *POOLS[1:]), (G, 3, *POOL[1:])
PART = {
    "kv_score": ((G, B, N, 2 * S), jnp.bfloat16),
    "kv_score[1]": ((1, 0, 0, 0), jnp.bfloat16),
    "ape": ((1, R, S), jnp.float32),
    "state.kv": (POOLS, jnp.float32),
    "state.score": (POOLS, jnp.float32),
    "kv_tables": ((1, B, 6), jnp.int32),
    "score_tables": ((G, B, 6), jnp.int32),
    "tables.records": ((1, B, 4), jnp.int32),
    "norm_weight": ((1, D), jnp.float32),
    "cos_sin_cache": ((1, 7, 64), jnp.float32),
    "records.pool": (POOL, jnp.uint8),
}
SHARED = {
    "kv_lens": ((G, B), jnp.int32),
    "q_lens": ((1, B), jnp.int32),
    "layer": ((1, 0), jnp.int32),
}
WRITTEN = ("state.kv", "state.score", "records.pool")
LAYERS = {"state.kv": (LAYER_POOLS, jnp.float32), "state.score": (LAYER_POOLS, jnp.float32)}
LAYERS |= {"records.pool": (LAYER_POOL, jnp.uint8), "layer": ((1, 1), jnp.int32)}
ATTRIBUTES = {"next_n": N, "layer": -1, "geometry": -1}
PART_ATTRIBUTES = {
    "compress_ratio": R,
    "overlap": True,
    "column": 0,
    "kv_score_dtype": BF16,
    "state_format": np.uint8(0),
    "state_dtype": F32,
    "format": np.uint8(RECORD_FORMATS.index("fp8_block128")),
    "page_size": PAGE_SIZE,
    "scales": np.uint8(0),
    "scale_floor": False,
    "rms_norm_eps": np.float32(1e-6),
    "interleaved": False,
    "hadamard": False,
    "rounding": np.uint8(0),
}


def raw_call(changed=None, attributes=None, of_part=None, count=1, results=None, aliased=WRITTEN):
    """With some operands, or results, as (shape, dtype), in a call of one or two compressors.

    ``changed`` and ``of_part`` change the last one; ``of_part`` its attributes, None: takes away.
    """
    specs, targets, aliases = [], [], {}
    all_attributes = ATTRIBUTES | (attributes or {})
    for i in range(count):
        is_last = i == count - 1
        part = PART | ({k: v for k, v in (changed or {}).items() if k in PART} if is_last else {})
        for name, spec in part.items():
            if name in WRITTEN:
                if not is_last or name in aliased:
                    aliases[len(specs)] = len(targets)
                targets.append((results or {}).get(name, spec) if is_last else spec)
            specs.append(spec)
        own = PART_ATTRIBUTES | (of_part or {} if is_last else {})
        own = {k: v for k, v in own.items() if v is not None}
        all_attributes.setdefault(f"compressor_{i}", own)
    shared = SHARED | {k: v for k, v in (changed or {}).items() if k in SHARED}
    specs += shared.values()
    call = jax.ffi.ffi_call(
        decode_records_of(count, False).target,
        [jax.ShapeDtypeStruct(*target) for target in targets],
        input_output_aliases=aliases,
    )
    given = {k: v for k, v in all_attributes.items() if v is not None}
    with jax.default_device(jax.devices("cpu")[0]):
        operands = [np.zeros(*spec) for spec in specs]
        return jax.block_until_ready(jax.jit(lambda *x: call(*x, **given))(*operands))


def check_refused(text, *arguments, **keywords):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{text}"):
        raw_call(*arguments, **keywords)


@pytest.mark.parametrize("state_format", (0, 1))
@pytest.mark.parametrize("count", (1, 2))
def test_good_operands_are_served(count, state_format):
    of_part = {"state_format": np.uint8(state_format)}
    assert len(raw_call(count=count, of_part=of_part)) == 3 * count
    raw_call(LAYERS, of_part=of_part)
    raw_call(LAYERS | {"layer": SHARED["layer"]}, {"layer": 2}, of_part)
    wider = {"kv_score": ((G, B, N, 3 * S), jnp.bfloat16)}
    raw_call(wider, count=count)
    raw_call(wider, of_part={"column": S})
    raw_call({"tables.records": ((1, B, 5), jnp.int32)})


# Where the operand that is wrong is the one that the others are measured by.
NAMED_INSTEAD = {
    ("state.kv", "other groups"): "state.score",
    ("state.kv", "too many dimensions"): "state.score",
    ("kv_tables", "longer"): "score_tables",
    ("kv_lens", "longer"): "kv_score",
    ("layer", "longer"): "kv_score",  # what was no layer is one
}
GOOD = (("kv_score", "longer"), ("tables.records", "longer"))


@pytest.mark.parametrize(
    ("name", "other"),
    [pair for pair in itertools.product(PART | SHARED, OTHER_SHAPES) if pair not in GOOD],
)
def test_wrong_shapes_are_refused(name, other):
    shape, dtype = (PART | SHARED)[name]
    named = re.escape(NAMED_INSTEAD.get((name, other), name))
    check_refused(f"decode_records: {named}: expected", {name: (OTHER_SHAPES[other](shape), dtype)})


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.int16, jnp.uint32))
@pytest.mark.parametrize("name", PART | SHARED)
def test_wrong_dtypes_are_refused(name, dtype):
    shape, _ = (PART | SHARED)[name]
    text = f"decode_records: {re.escape(name)}: expected .*, got "
    check_refused(text, {name: (shape, dtype)})


@pytest.mark.parametrize("name", PART)
def test_it_says_whose_operand_is_wrong(name):
    shape, dtype = PART[name]
    wrong = {name: (OTHER_SHAPES["other groups"](shape), dtype)}
    check_refused(rf"decode_records: compressor\[1\]: {re.escape(name)}: expected", wrong, count=2)


@pytest.mark.parametrize("name", SHARED)
def test_what_all_share_is_nobodys(name):
    check_refused(
        f"decode_records: {name}: expected", {name: (SHARED[name][0], jnp.uint32)}, count=2
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_a_wrong_result_is_refused(name):
    shape, dtype = PART[name]
    wrong = {name: ((shape[0], shape[1] + 1, *shape[2:]), dtype)}
    others = tuple(other for other in WRITTEN if other != name)
    check_refused(f"decode_records: {name} result: expected", results=wrong, aliased=others)
    named = name.split(".")[0] if name != "records.pool" else name
    check_refused(f"decode_records: {named}: the results must alias", aliased=others)


def test_another_number_of_operands_is_refused():
    call = jax.ffi.ffi_call(
        decode_records_of(1, False).target, [jax.ShapeDtypeStruct((1,), jnp.uint8)] * 4
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="expected 14 operands and 3 results, got 1 and 4"
    ):
        jax.block_until_ready(jax.jit(lambda x: call(x, **ATTRIBUTES))(np.zeros(1)))


HUGE = 1 << 31
ONE_GROUP = {name: ((1, *shape[1:]), dtype) for name, (shape, dtype) in (PART | SHARED).items()}


@pytest.mark.parametrize(
    ("changed", "attributes", "of_part", "text"),
    [
        ({}, {"next_n": N + 1}, {}, "kv_score: expected"),
        ({}, {"next_n": 0}, {}, "next_n: expected 1"),
        ({}, {"next_n": np.int32(N)}, {}, "next_n: .*expected S64 but got S32"),
        ({}, {"geometry": -2}, {}, "geometry: expected -1"),
        ({}, {"geometry": np.int32(0)}, {}, "geometry: .*expected S64 but got S32"),
        ({}, {"layer": 0}, {}, "kv_score: expected"),
        (LAYERS, {"layer": 1}, {}, "layer: expected an index"),
        (LAYERS | {"layer": SHARED["layer"]}, {"layer": 3}, {}, "layer: expected an index"),
        (LAYERS | {"layer": SHARED["layer"]}, {"layer": -2}, {}, "layer: expected an index"),
        (LAYERS | {"layer": ((1, 2), jnp.int32)}, {}, {}, "layer: expected S32"),
        (
            LAYERS | {"layer": SHARED["layer"], "records.pool": ((G, 2, *POOL[1:]), jnp.uint8)},
            {"layer": 2},
            {},
            "layer: expected an index of one of the pool's layers",
        ),
        ({}, {}, {"compress_ratio": 5}, "no compiled configuration for .*compress_ratio 5"),
        ({}, {}, {"overlap": False}, "no compiled configuration for .*overlap false"),
        ({}, {}, {"overlap": 1}, "compressor_0: .*expected PRED but got S64"),
        ({}, {}, {"column": 4}, rf"kv_score: expected .*,{2 * S + 4}\]"),
        ({}, {}, {"column": -1}, "column: expected 0"),
        ({}, {}, {"column": HUGE}, "column: expected 0"),
        (
            dict.fromkeys(("kv_score", "kv_score[1]"), ((G, B, N, S), jnp.bfloat16)),
            {},
            {"column": 4},
            rf"kv_score: expected .*,{S + 4}\]",
        ),
        ({}, {}, {"kv_score_dtype": F32}, "kv_score: expected F32"),
        ({}, {}, {"state_dtype": BF16}, "state.kv: expected BF16"),
        ({}, {}, {"state_format": np.uint8(2)}, "state_format: expected 0"),
        (
            {},
            {},
            {"state_format": np.uint8(1), "state_dtype": BF16},
            "state_dtype: expected F32 .* BF16",
        ),
        ({}, {}, format_of("fp8_ds_mla"), f"no compiled format fp8_ds_mla for head_dim {D}"),
        ({}, {}, {"format": np.uint8(6)}, "format: expected 0 to 5"),
        ({}, {}, {"page_size": 0}, "page_size: expected 1"),
        ({}, {}, {"page_size": PAGE_SIZE + 1}, "records.pool: expected pages of a multiple of 4"),
        ({}, {}, {"scales": np.uint8(3)}, "scales: expected"),
        ({}, {}, {"scale_floor": True}, "scale_floor: expected false"),
        ({}, {}, {"rms_norm_eps": np.float32(np.nan)}, "rms_norm_eps: expected"),
        ({}, {}, {"rms_norm_eps": 1e-6}, "compressor_0: .*expected F32 but got F64"),
        ({}, {}, {"rounding": np.uint8(3)}, "rounding: expected 0 to 2"),
        (
            ONE_GROUP | {"state.kv": ((HUGE, 0, 8, S), jnp.float32)},
            {},
            {},
            "state.score: expected",
        ),
        (
            ONE_GROUP | dict.fromkeys(("state.kv", "state.score"), ((HUGE, 0, 8, S), jnp.float32)),
            {},
            {},
            "kv_tables: requests and max_pages must be below 2.31",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changed, attributes, of_part, text):
    check_refused(f"decode_records: .*{text}", changed, attributes, of_part)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_missing_attribute_is_refused(name):
    text = "Wrong number of attributes: expected 4 attributes but got 3"
    check_refused(f"decode_records: {text}", attributes={name: None})
    text = f"{name}: Unexpected attribute"
    check_refused(f"decode_records: {text}", attributes={name: None, "another": 1})


@pytest.mark.parametrize("name", PART_ATTRIBUTES)
def test_a_missing_attribute_of_a_compressor_is_refused(name):
    count = len(PART_ATTRIBUTES)
    text = f"Wrong number of attributes: expected {count} attributes but got {count - 1}"
    check_refused(f"decode_records: compressor_1: {text}", of_part={name: None}, count=2)


def test_what_is_no_compressors_attributes_is_refused():
    check_refused("compressor_0: Wrong attribute type", attributes={"compressor_0": R})
