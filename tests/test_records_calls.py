"""The custom call that stores records, unwrapped: whatever is wrong with it is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import OTHER_SHAPES

from jax_dsv4.records import DEQUANTIZE, RECORD_FORMATS, STORE

G, N, D, PAGES, PAGE_SIZE = 2, 3, 128, 4, 5
POOL = (G, PAGES, PAGE_SIZE * (D + 4))
OPERANDS = {
    "values": ((G, N, D), jnp.float32),
    "slots": ((1, N), jnp.int32),
    "positions": ((G, N), jnp.int32),
    "norm_weight": ((1, D), jnp.float32),
    "cos_sin_cache": ((1, 7, 64), jnp.float32),
    "records.pool": (POOL, jnp.uint8),
    "layer": ((1, 0), jnp.int32),
}
LAYERS = {"records.pool": ((G, 3, *POOL[1:]), jnp.uint8), "layer": ((1, 1), jnp.int32)}
F32, POWER_OF_TWO = np.uint8(0), np.uint8(1)
ATTRIBUTES = {
    "format": np.uint8(RECORD_FORMATS.index("fp8_block128")),
    "page_size": PAGE_SIZE,
    "scales": F32,
    "scale_floor": False,
    "rms_norm_eps": np.float32(1e-6),
    "interleaved": False,
    "hadamard": False,
    "rounding": np.uint8(0),
    "layer": -1,
    "geometry": -1,
}


def format_of(name):
    return {"format": np.uint8(RECORD_FORMATS.index(name))}


def raw_call(changed=None, attributes=ATTRIBUTES, result=None, aliases=((5, 0),), count=7):
    """With some operands, or the result, as (shape, dtype)."""
    specs = OPERANDS | (changed or {})
    operands = [np.zeros(*spec) for spec in specs.values()][:count]
    result = jax.ShapeDtypeStruct(*(result or specs["records.pool"]))
    call = jax.ffi.ffi_call(
        STORE.target,
        result,
        input_output_aliases=dict(aliases),
        has_side_effect=True,  # else XLA drops a call whose result is empty
    )
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.block_until_ready(jax.jit(lambda *x: call(*x, **attributes))(*operands))


def check_refused(text, *arguments, **keywords):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{text}"):
        raw_call(*arguments, **keywords)


def test_good_operands_are_served():
    pool = np.asarray(raw_call())
    assert np.all(pool[:, 0, -PAGE_SIZE * 4 :].view(np.float32)[:, 0] == np.float32(1e-4) / 448)
    assert np.all(np.asarray(raw_call(LAYERS))[:, 0] == pool)
    in_layer = np.asarray(
        raw_call(LAYERS | {"layer": ((1, 0), jnp.int32)}, ATTRIBUTES | {"layer": 2})
    )
    assert np.all(in_layer[:, 2] == pool) and np.all(in_layer[:, :2] == 0)


# Where the operand that is wrong is the one that the others are measured by.
NAMED_INSTEAD = {
    ("values", "longer"): f"no compiled format fp8_block128 for head_dim {D + 1}",
    ("records.pool", "longer"): "records.pool: expected pages of a multiple of 4 bytes",
    ("records.pool", "other groups"): "values: expected",
    ("records.pool", "too many dimensions"): "values: expected",
    # What was no layer is one.
    ("layer", "longer"): r"records.pool: expected \[..., layers, num_pages, page_bytes\]",
}


@pytest.mark.parametrize("other", OTHER_SHAPES)
@pytest.mark.parametrize("name", OPERANDS)
def test_wrong_shapes_are_refused(name, other):
    shape, dtype = OPERANDS[name]
    changed = {name: (OTHER_SHAPES[other](shape), dtype)}
    if (name, other) == ("layer", "longer"):
        changed["records.pool"] = (POOL[1:], jnp.uint8)
    text = NAMED_INSTEAD.get((name, other), f"{re.escape(name)}: expected")
    check_refused(f"store_records: {text}", changed)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.int16, jnp.uint32))
@pytest.mark.parametrize("name", OPERANDS)
def test_wrong_dtypes_are_refused(name, dtype):
    check_refused(
        f"store_records: {re.escape(name)}: expected ", {name: (OPERANDS[name][0], dtype)}
    )


def test_another_number_of_operands_is_refused():
    text = "store_records: expected 7 operands and 1 results, got 6 and 1"
    check_refused(text, count=6)


@pytest.mark.parametrize("wrong", [((G, PAGES + 1, POOL[2]), jnp.uint8), (POOL, jnp.int8)])
def test_a_wrong_result_is_refused(wrong):
    check_refused("store_records: records.pool result: expected", result=wrong, aliases=())


def test_a_pool_that_is_not_aliased_is_refused():
    check_refused("store_records: records.pool: the results must alias", aliases=())


HUGE = 1 << 31
SHARED = {name: ((1, *shape[1:]), dtype) for name, (shape, dtype) in OPERANDS.items()}
TOO_LONG = f"records.pool: expected pages of a multiple of 4 bytes .* {D + 4} bytes, got"


@pytest.mark.parametrize(
    ("changed", "attributes", "text"),
    [
        (
            {"records.pool": (POOL[1:], jnp.uint8)},
            {"layer": 0},
            r"records.pool: expected \[..., layers, num_pages, page_bytes\], got",
        ),
        ({"norm_weight": ((), jnp.float32)}, {}, r"norm_weight: expected \[..., head_dim\], got"),
        ({"layer": ((), jnp.int32)}, {}, r"layer: expected \[..., 0 or 1\], got"),
        (LAYERS, {"layer": 1}, "layer: expected an index"),
        (LAYERS | {"layer": ((1, 0), jnp.int32)}, {"layer": 3}, "layer: expected an index"),
        (LAYERS | {"layer": ((1, 0), jnp.int32)}, {"layer": -2}, "layer: expected an index"),
        (LAYERS | {"layer": ((1, 2), jnp.int32)}, {}, "layer: expected S32"),
        (LAYERS | {"layer": ((3, 1), jnp.int32)}, {}, "layer: expected S32"),
        ({}, {"page_size": PAGE_SIZE + 1}, f"{TOO_LONG} {POOL[2]}"),
        ({"records.pool": ((*POOL[:2], POOL[2] - 4), jnp.uint8)}, {}, TOO_LONG),
        ({"records.pool": ((*POOL[:2], POOL[2] + 2), jnp.uint8)}, {}, TOO_LONG),
        (
            SHARED | {"records.pool": ((HUGE, 0, POOL[2]), jnp.uint8)},
            {},
            "values: groups times values must be below",
        ),
        (
            LAYERS | {"records.pool": ((G, HUGE, 0, POOL[2]), jnp.uint8)},
            {},
            "records.pool: layers and pages must be below",
        ),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_each_other_are_refused(changed, attributes, text):
    check_refused(f"store_records: .*{text}", changed, ATTRIBUTES | attributes)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"format": np.uint8(6)}, "format: expected 0 to 5"),
        ({"format": 0}, "expected U8 but got S64"),
        (format_of("fp8_ds_mla"), f"no compiled format fp8_ds_mla for head_dim {D}"),
        ({"page_size": 0}, "page_size: expected 1"),
        ({"page_size": HUGE}, "page_size: expected 1"),
        ({"page_size": np.int32(PAGE_SIZE)}, "expected S64 but got S32"),
        ({"scales": np.uint8(3)}, "scales: expected"),
        (format_of("mxfp4") | {"scales": POWER_OF_TWO}, "scales: expected"),
        ({"scale_floor": True}, "scale_floor: expected false"),
        ({"rms_norm_eps": np.float32(-1)}, "rms_norm_eps: expected"),
        ({"rms_norm_eps": np.float32(np.nan)}, "rms_norm_eps: expected"),
        ({"rms_norm_eps": 1e-6}, "expected F32 but got F64"),
        (format_of("fp8_ds_mla") | {"hadamard": True}, "hadamard: expected false"),
        ({"hadamard": 1}, "expected PRED but got S64"),
        ({"rounding": np.uint8(3)}, "rounding: expected 0 to 2"),
        ({"geometry": 0}, "geometry: expected -1"),
    ],
    ids=str,
)
def test_wrong_attributes_are_refused(changed, text):
    check_refused(text, attributes=ATTRIBUTES | changed)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_missing_attribute_is_refused(name):
    attributes = {key: value for key, value in ATTRIBUTES.items() if key != name}
    check_refused(
        f"Wrong number of attributes: expected {len(ATTRIBUTES)} attributes but got "
        f"{len(attributes)}",
        attributes=attributes,
    )


# ---------------------------------------------------------------------------------- reading records


READ_OPERANDS = {
    "slots": ((G, N), jnp.int32),
    "records.pool": ((1, *POOL[1:]), jnp.uint8),
    "layer": ((1, 0), jnp.int32),
}
READ_ATTRIBUTES = {name: ATTRIBUTES[name] for name in ("format", "page_size", "scales")}
READ_ATTRIBUTES |= {"layer": -1, "geometry": -1}
DEEP = {"records.pool": ((1, 3, *POOL[1:]), jnp.uint8)}


def raw_read(changed=None, attributes=None, result=((G, N, D), jnp.float32), count=3):
    specs = READ_OPERANDS | (changed or {})
    operands = [
        np.full(shape, 0x38 if name == "records.pool" else 0, dtype)
        for name, (shape, dtype) in specs.items()
    ][:count]
    call = jax.ffi.ffi_call(DEQUANTIZE.target, jax.ShapeDtypeStruct(*result), has_side_effect=True)
    attributes = READ_ATTRIBUTES | (attributes or {})
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.block_until_ready(jax.jit(lambda *x: call(*x, **attributes))(*operands))


def test_good_operands_are_read():
    want = np.full(4, 0x38, np.uint8).view(np.float32)  # the scale; 0x38 is 1 in e4m3
    assert np.all(np.asarray(raw_read()) == want)
    layers = {"records.pool": ((G, 3, *POOL[1:]), jnp.uint8), "layer": ((G, 1), jnp.int32)}
    assert np.all(np.asarray(raw_read(layers)) == want)


@pytest.mark.parametrize(
    ("text", "keywords"),
    [
        ("expected 3 operands and 1 results, got 2", {"count": 2}),
        (r"slots: expected \[..., N\]", {"changed": {"slots": ((), jnp.int32)}}),
        ("slots: expected S32", {"changed": {"slots": ((G, N), jnp.uint32)}}),
        ("records.pool: expected U8", {"changed": {"records.pool": (POOL, jnp.int8)}}),
        ("records.pool: expected U8", {"changed": {"records.pool": ((3, *POOL[1:]), jnp.uint8)}}),
        ("records.pool: expected pages", {"attributes": {"page_size": PAGE_SIZE + 1}}),
        ("page_size: expected 1", {"attributes": {"page_size": 0}}),
        ("format: expected 0 to 5", {"attributes": {"format": np.uint8(6)}}),
        ("scales: expected 0, or 1", {"attributes": {"scales": np.uint8(3)}}),
        ("layer: expected an index", {"changed": DEEP, "attributes": {"layer": 3}}),
        ("layer: expected S32", {"changed": {"layer": ((1, 1), jnp.float32)} | DEEP}),
        ("geometry: expected -1", {"attributes": {"geometry": 0}}),
        ("values: expected F32", {"result": ((G, N, D), jnp.bfloat16)}),
        ("values: expected F32", {"result": ((G, N + 1, D), jnp.float32)}),
        (
            "no compiled format fp8_block128 for head_dim 256",
            {"result": ((G, N, 256), jnp.float32)},
        ),
    ],
)
def test_wrong_operands_are_not_read(text, keywords):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"dequantize_records: {text}"):
        raw_read(**keywords)
