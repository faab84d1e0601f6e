"""Bad input of every kind: an error that names the argument, never a crash."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import step_of

from jax_dsv4 import CompressorState, _config, init_records, init_state, paged_kv_compress
from jax_dsv4.decode import DECODE

CASE = cases.MAPPED
B, N, R, S = CASE.batch, CASE.next_n, CASE.ratio, CASE.state_dim
POOL = (5, 8, S)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def pools(kv, score=None):
    return CompressorState(kv, kv if score is None else score)


def good_arguments():
    return {
        "kv_score": spec(B, N, 2 * S),
        "ape": spec(R, S),
        "state": pools(spec(*POOL)),
        "block_tables": (spec(B, 6, dtype=jnp.int32), spec(B, 6, dtype=jnp.int32)),
        "kv_lens": spec(B, dtype=jnp.int32),
        "q_lens": spec(B, dtype=jnp.int32),
    }


def trace(implementation=None, compress_ratio=R, overlap=None, out_dtype="float32", **arguments):
    static = {"implementation": implementation, "compress_ratio": compress_ratio}
    static["overlap"] = overlap
    return jax.eval_shape(
        lambda arrays: paged_kv_compress(**arrays, **static, out_dtype=out_dtype),
        good_arguments() | arguments,
    )


I32_TABLE = spec(B, 6, dtype=jnp.int32)
BAD_ARRAYS = {
    "kv_score of rank 2": ("kv_score", spec(B, 2 * S), ValueError),
    "kv_score of another width": ("kv_score", spec(B, N, S), ValueError),
    "kv_score without rows": ("kv_score", spec(B, 0, 2 * S), ValueError),
    "kv_score of integers": ("kv_score", spec(B, N, 2 * S, dtype=jnp.int32), TypeError),
    "kv_score in float16": ("kv_score", spec(B, N, 2 * S, dtype=jnp.float16), TypeError),
    "ape of another ratio": ("ape", spec(R + 1, S), ValueError),
    "ape of another width": ("ape", spec(R, S // 2), ValueError),
    "ape of rank 1": ("ape", spec(S), ValueError),
    "ape without rows": ("ape", spec(0, S), ValueError),
    "ape in bfloat16": ("ape", spec(R, S, dtype=jnp.bfloat16), TypeError),
    "a state of rank 2": ("state.kv", pools(spec(40, S)), ValueError),
    "a state in float16": ("state.kv", pools(spec(*POOL, dtype=jnp.float16)), TypeError),
    "a state of integers": ("state.kv", pools(spec(*POOL, dtype=jnp.int32)), TypeError),
    "a score of another shape": ("state.score", pools(spec(*POOL), spec(6, 8, S)), ValueError),
    "a score of another dtype": (
        "state.score",
        pools(spec(*POOL), spec(*POOL, dtype=jnp.bfloat16)),
        TypeError,
    ),
    "a state of empty pages": ("state", pools(spec(5, 0, S)), ValueError),
    "a state of odd width": ("state", pools(spec(5, 8, S - 1)), ValueError),
    "a table of rank 1": ("block_tables", spec(B, dtype=jnp.int32), ValueError),
    "a table of another batch": ("block_tables", spec(B + 1, 6, dtype=jnp.int32), ValueError),
    "a table of floats": ("block_tables", spec(B, 6), TypeError),
    "a table of unsigned": ("block_tables", spec(B, 6, dtype=jnp.uint32), TypeError),
    "three tables": ("block_tables", (I32_TABLE,) * 3, ValueError),
    "a score table of another length": (
        "block_tables[1]",
        (I32_TABLE, spec(B, 7, dtype=jnp.int32)),
        ValueError,
    ),
    "a score table of int16": (
        "block_tables[1]",
        (I32_TABLE, spec(B, 6, dtype=jnp.int16)),
        TypeError,
    ),
    "kv_lens of another batch": ("kv_lens", spec(B - 1, dtype=jnp.int32), ValueError),
    "a scalar for kv_lens": ("kv_lens", spec(dtype=jnp.int32), ValueError),
    "kv_lens of floats": ("kv_lens", spec(B), TypeError),
    "q_lens of another batch": ("q_lens", spec(B + 1, dtype=jnp.int32), ValueError),
    "q_lens of no requests": ("q_lens", spec(0, dtype=jnp.int32), ValueError),
    "q_lens of rank 2": ("q_lens", spec(B, N, dtype=jnp.int32), ValueError),
    "q_lens of floats": ("q_lens", spec(B), TypeError),
}


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
@pytest.mark.parametrize(("name", "array", "error"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_a_wrong_array_is_named(name, array, error, implementation):
    argument = re.match(r"\w+", name)[0]
    with pytest.raises(error, match=rf"^{re.escape(name)}: expected .*, got "):
        trace(implementation, **{argument: array})


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("kv_score", np.zeros((B, N, 2 * S))),
        ("block_tables", np.full((B, 6), (1 << 32) + 1)),
        ("kv_lens", np.full(B, (1 << 32) + 4)),
    ],
)
def test_numpys_64_bits_are_not_cut_to_32(name, array):
    cast = r"; cast it yourself: .*astype\(jnp\.int32\)" if array.dtype == np.int64 else ""
    with pytest.raises(TypeError, match=f"^{name}: expected .*, got (int|float)64{cast}"):
        jax.eval_shape(
            lambda others: paged_kv_compress(**others | {name: array}, compress_ratio=R),
            good_arguments(),
        )


def test_good_arguments_pass():
    kv_comp, _ = trace()
    assert kv_comp.shape == (B, 1, CASE.head_dim)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("compress_ratio", 5, ValueError),
        ("compress_ratio", 0, ValueError),
        ("compress_ratio", "4", ValueError),
        ("compress_ratio", None, ValueError),
        ("compress_ratio", 4.0, (TypeError, ValueError)),
        ("compress_ratio", [4], (TypeError, ValueError)),
        ("compress_ratio", jnp.int32(4), (TypeError, ValueError)),
        ("out_dtype", jnp.int32, TypeError),
        ("out_dtype", jnp.float16, TypeError),
        ("out_dtype", "nonsense", TypeError),
        ("implementation", "cuda", ValueError),
        ("implementation", "", ValueError),
    ],
)
def test_a_wrong_attribute_is_named(name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected "):
        trace(**{name: value})


@pytest.mark.parametrize("state", [None, spec(*POOL), (spec(*POOL), spec(*POOL))])
def test_only_a_compressor_state_is_a_state(state):
    with pytest.raises(TypeError, match=r"^state: expected a CompressorState, got "):
        trace(state=state)


def test_a_state_of_another_format_is_refused():
    state = CompressorState(spec(*POOL), spec(*POOL), "another")
    with pytest.raises(ValueError, match=r"^state\.format: expected .*'prefix'.*, got 'another'"):
        trace(state=state)


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
def test_a_state_of_prefixes_is_f32(implementation):
    bf16 = spec(*POOL, dtype=jnp.bfloat16)
    for dtype_of_score in (bf16, spec(*POOL)):
        state = CompressorState(bf16, dtype_of_score, "prefix")
        with pytest.raises(TypeError, match=r"^state\.kv: expected float32 .* 'prefix'.*drifts"):
            trace(implementation, state=state)
    trace(implementation, state=CompressorState(spec(*POOL), spec(*POOL), "prefix"))


@pytest.mark.parametrize("name", ["kv_score", "block_tables", "kv_lens"])
def test_a_required_array_that_is_none_is_named(name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        trace(**{name: None})


@pytest.mark.parametrize("implementation", (None, "ffi"))
def test_an_uncompiled_head_dim_lists_the_compiled_ones(implementation):
    arrays = {"kv_score": spec(B, N, 96), "ape": spec(R, 48), "state": pools(spec(5, 8, 48))}
    with pytest.raises(ValueError, match="head_dim 24") as raised:
        trace(implementation, **arrays)
    for kind in _config.KINDS:
        assert str(kind) in str(raised.value)
    for dtypes in _config.DTYPES:
        assert "/".join(dtypes) in str(raised.value)
    trace("xla", **arrays)


@pytest.mark.parametrize(("ratio", "overlap", "head_dim"), [(R, False, S), (128, True, S // 2)])
def test_a_state_that_fits_another_kind_says_which(ratio, overlap, head_dim):
    """S = 256 is D 128 overlapping or D 256 disjoint: the width alone settles nothing."""
    text = rf"head_dim {head_dim}, compress_ratio {ratio}, overlap {overlap}.*S = {S} is 128/4 over"
    with pytest.raises(ValueError, match=text):
        trace(compress_ratio=ratio, overlap=overlap)


@pytest.mark.parametrize("overlap", [0, 1, "yes", jnp.bool_(True)], ids=repr)
def test_overlap_is_true_false_or_none(overlap):
    with pytest.raises(TypeError, match=r"^overlap: expected True, False or None, got "):
        trace(overlap=overlap)


def test_numpys_integers_are_integers():
    for ratio in (np.int64(R), np.int32(R), np.uint8(R)):
        trace(compress_ratio=ratio, overlap=np.bool_(True))


@pytest.mark.parametrize("name", ["layer", "compress_ratio"])
def test_a_truth_value_is_no_integer(name):
    layers = CompressorState(*(spec(2, *POOL) for _ in range(2)))
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got True"):
        jax.eval_shape(
            lambda arrays: paged_kv_compress(
                **arrays, **{"layer": 0, "compress_ratio": R, name: True}
            ),
            good_arguments() | {"state": layers},
        )


def test_operands_on_different_devices_are_named():
    first, second = jax.devices("cpu")[:2]
    state = init_state(2, 8, head_dim=128, compress_ratio=4)
    operands = jax.device_put((jnp.ones((1, 1, 512)), None), first), jax.device_put(state, second)
    with pytest.raises(ValueError, match=r"argument state_kv of paged_kv_compress with"):
        (kv_score, ape), state = operands
        paged_kv_compress(kv_score, ape, state, np.zeros((1, 1), np.int32), [1], compress_ratio=4)


def test_a_traced_ratio_says_how_to_make_it_static():
    with pytest.raises(TypeError, match=r"^compress_ratio: expected a static .*static_argnames"):
        jax.jit(paged_kv_compress).eval_shape(**good_arguments(), compress_ratio=R)


def test_an_abstract_array_is_told_from_an_array():
    arguments = good_arguments() | {"q_lens": None}
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments)
    with pytest.raises(TypeError, match=r"^kv_lens: expected an array, got a ShapeDtypeStruct"):
        paged_kv_compress(**arrays | {"kv_lens": arguments["kv_lens"]}, compress_ratio=R)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_pages", 8 / 2), ("page_size", 2.5), ("head_dim", "128"), ("layers", 1.0)],
)
def test_init_state_takes_integers_only(name, value):
    good = {"num_pages": 3, "page_size": 8, "head_dim": 128, "compress_ratio": 4}
    with pytest.raises(TypeError, match=rf"^{name}: expected an integer, got {value!r}"):
        init_state(**good | {name: value})
    init_state(**good | {"num_pages": np.int64(3)})


def test_uncompiled_dtypes_are_refused(monkeypatch):
    dtypes = _config.DTypes(*("bfloat16",) * 3)
    monkeypatch.setattr(_config, "DTYPES", (dtypes,))
    with pytest.raises(ValueError, match=r"state float32.* for bfloat16/bfloat16/bfloat16;"):
        trace()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_pages", -1, ValueError),
        ("page_size", 0, ValueError),
        ("head_dim", 0, ValueError),
        ("compress_ratio", 3, ValueError),
        ("dtype", jnp.float16, TypeError),
        ("format", "another", ValueError),
    ],
)
def test_init_state_names_a_wrong_argument(name, value, error):
    good = {"num_pages": 3, "page_size": 8, "head_dim": 128, "compress_ratio": 4}
    with pytest.raises(error, match=rf"^.*{name}.*: expected .* got "):
        init_state(**good | {name: value})


def test_init_state_makes_no_prefixes_in_bf16():
    with pytest.raises(TypeError, match=r"^dtype: expected float32 .* got bfloat16: .*drifts"):
        init_state(3, 8, head_dim=128, compress_ratio=4, dtype=jnp.bfloat16, format="prefix")


@pytest.mark.parametrize(
    "init",
    [
        partial(init_state, head_dim=128, compress_ratio=128),
        partial(init_records, head_dim=128, format="f32"),
    ],
)
def test_arrays_with_which_xla_would_end_the_process_are_refused(init):
    jax.eval_shape(partial(init, 2**22, 2**20, layers=2**11))  # of 2**62 bytes
    with pytest.raises(ValueError, match=rf"^layers, num_pages, .*: expected .* got {2**63}$"):
        init(2**22, 2**20, layers=2**12)


# ------------------------------------------------------------------------------------ derivatives


def loss(implementation):
    operands = cases.make_operands(CASE)
    step = step_of(CASE, implementation)

    def loss(kv_score, ape):
        rest = operands.astuple()[2:]
        return step(kv_score, ape, *rest).kv_comp.sum()

    return loss, jnp.array(operands.kv_score), jnp.array(operands.ape)


DERIVATIVES = {
    "grad": lambda f, x, a: jax.grad(f)(x, a),
    "grad by ape": lambda f, x, a: jax.grad(f, argnums=1)(x, a),
    "grad of jit": lambda f, x, a: jax.grad(jax.jit(f))(x, a),
    "jit of grad": lambda f, x, a: jax.jit(jax.grad(f))(x, a),
    "jvp": lambda f, x, a: jax.jvp(f, (x, a), (x, a)),
    "vjp": lambda f, x, a: jax.vjp(f, x, a),
    "vmap of grad": lambda f, x, a: jax.vmap(jax.grad(f))(x[None], a[None]),
    "grad of vmap": lambda f, x, a: jax.grad(lambda x: jax.vmap(f, (0, None))(x, a).sum())(x[None]),
}


@pytest.mark.parametrize("implementation", (None, "ffi", "xla"))
@pytest.mark.parametrize("differentiate", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_raise_a_clear_error(differentiate, implementation):
    with pytest.raises(NotImplementedError, match="paged_kv_compress has no derivative"):
        differentiate(*loss(implementation))


def test_the_advice_of_that_error_works():
    function, kv_score, ape = loss("ffi")
    stop = jax.lax.stop_gradient
    gradient = jax.grad(lambda x: function(stop(x), stop(ape)) + 3 * x.sum())(kv_score)
    np.testing.assert_array_equal(gradient, 3)


# -------------------------------------------------------------------- the custom call, unwrapped

POOLS = (2, 5, 8, S)  # two groups
RAW_OPERANDS = {
    "kv_score": ((2, B, N, 2 * S), jnp.bfloat16),
    "kv_score[1]": ((1, 0, 0, 0), jnp.bfloat16),
    "ape": ((1, R, S), jnp.float32),
    "state.kv": (POOLS, jnp.float32),
    "state.score": (POOLS, jnp.float32),
    "kv_tables": ((1, B, 6), jnp.int32),
    "score_tables": ((2, B, 6), jnp.int32),
    "kv_lens": ((2, B), jnp.int32),
    "q_lens": ((1, B), jnp.int32),
    "layer": ((1, 0), jnp.int32),
}
STATE_ALIASES = ((3, 1), (4, 2))
RAW_RESULTS = {
    "kv_comp": ((2, B, 1, CASE.head_dim), jnp.float32),
    "state.kv result": (POOLS, jnp.float32),
    "state.score result": (POOLS, jnp.float32),
}
# With all layers of a kind in the state, and one of them named on the device.
LAYER_POOLS = (2, 3, 5, 8, S)
RAW_LAYERS = {
    "layer": ((1, 1), jnp.int32),
    **dict.fromkeys(
        ("state.kv", "state.score", "state.kv result", "state.score result"),
        (LAYER_POOLS, jnp.float32),
    ),
}
F32, BF16 = np.uint8(11), np.uint8(16)
RAW_ATTRIBUTES = {
    "compress_ratio": R,
    "overlap": True,
    "next_n": N,
    "layer": -1,
    "kv_score_dtype": BF16,
    "state_format": np.uint8(0),
    "state_dtype": F32,
    "out_dtype": F32,
    "geometry": -1,
}


def raw_call(changed=None, attributes=None, aliases=STATE_ALIASES):
    """The custom call with some operands or results as {name: (shape, dtype)}."""
    changed = changed or {}
    operands = [np.zeros(*changed.get(name, spec)) for name, spec in RAW_OPERANDS.items()]
    results = [jax.ShapeDtypeStruct(*changed.get(name, spec)) for name, spec in RAW_RESULTS.items()]
    call = jax.ffi.ffi_call(DECODE.target, results, input_output_aliases=dict(aliases))
    attributes = RAW_ATTRIBUTES if attributes is None else attributes
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.block_until_ready(jax.jit(lambda *x: call(*x, **attributes))(*operands))


@pytest.mark.parametrize("state_format", (0, 1))
def test_the_raw_call_serves_good_operands(state_format):
    kv_comp, *_ = raw_call(attributes=RAW_ATTRIBUTES | {"state_format": np.uint8(state_format)})
    np.testing.assert_array_equal(kv_comp, 0)


OTHER_SHAPES = {
    "longer": lambda shape: (*shape[:-1], shape[-1] + 1),
    "other groups": lambda shape: (3, *shape[1:]),
    "too many dimensions": lambda shape: (1, *shape),
    "too few dimensions": lambda shape: shape[-1:],
}
# Where the operand that is wrong is the one that the others are measured by.
NAMED_INSTEAD = {
    ("state.kv", "other groups"): "state.score",
    ("state.kv", "too many dimensions"): "state.score",
    ("kv_tables", "longer"): "score_tables",
    ("kv_lens", "longer"): "kv_score",
    ("layer", "longer"): "kv_score",
}
RAW_ARRAYS = RAW_OPERANDS | RAW_RESULTS


def check_refused(text, *arguments, **keywords):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s)INVALID_ARGUMENT: .*{text}"):
        raw_call(*arguments, **keywords)


@pytest.mark.parametrize("other", OTHER_SHAPES)
@pytest.mark.parametrize("name", [*RAW_OPERANDS, "kv_comp"])
def test_the_raw_call_refuses_wrong_shapes(name, other):
    shape, dtype = RAW_ARRAYS[name]
    changed = {name: (OTHER_SHAPES[other](shape), dtype)}
    if name.startswith("state."):  # an aliased result has the shape of its operand
        changed[f"{name} result"] = changed[name]
    if (name, other) == ("kv_comp", "longer"):
        check_refused(f"no compiled configuration for head_dim {CASE.head_dim + 1}", changed)
    else:
        named = re.escape(NAMED_INSTEAD.get((name, other), name))
        check_refused(f"paged_kv_compress: {named}: ", changed)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.int16, jnp.uint32))
@pytest.mark.parametrize("name", [*RAW_OPERANDS, "kv_comp"])
def test_the_raw_call_refuses_wrong_dtypes(name, dtype):
    changed = {name: (RAW_ARRAYS[name][0], dtype)}
    if name.startswith("state."):
        changed[f"{name} result"] = changed[name]
    check_refused(f"paged_kv_compress: {re.escape(name)}: expected .*, got ", changed)


@pytest.mark.parametrize("name", ["state.kv result", "state.score result"])
@pytest.mark.parametrize("wrong", [((2, 6, 8, S), jnp.float32), (POOLS, jnp.bfloat16)])
def test_the_raw_call_refuses_a_wrong_state_result(name, wrong):
    check_refused(f"paged_kv_compress: {name}: expected", {name: wrong}, aliases=())


@pytest.mark.parametrize("state_format", (0, 1))
def test_the_raw_call_serves_a_state_of_layers(state_format):
    kv_comp, kv, _ = raw_call(
        RAW_LAYERS, attributes=RAW_ATTRIBUTES | {"state_format": np.uint8(state_format)}
    )
    assert kv.shape == LAYER_POOLS
    np.testing.assert_array_equal(kv_comp, 0)
    without_operand = RAW_LAYERS | {"layer": RAW_OPERANDS["layer"]}
    raw_call(without_operand, attributes=RAW_ATTRIBUTES | {"layer": 2})


@pytest.mark.parametrize(
    ("changed", "attributes", "text"),
    [
        ({"layer": ((1, 0), jnp.int32)}, {"layer": 3}, "layer: expected an index"),
        ({"layer": ((1, 0), jnp.int32)}, {"layer": -2}, "layer: expected an index"),
        ({}, {"layer": 1}, "layer: expected an index"),
        ({"layer": ((1, 2), jnp.int32)}, {}, "layer: expected S32"),
        ({"layer": ((3, 1), jnp.int32)}, {}, "layer: expected S32"),
        ({"layer": ((1, 1), jnp.int64)}, {}, "layer: expected S32"),
    ],
)
def test_the_raw_call_refuses_a_wrong_layer(changed, attributes, text):
    with jax.enable_x64(True):
        check_refused(text, RAW_LAYERS | changed, attributes=RAW_ATTRIBUTES | attributes)


@pytest.mark.parametrize("aliases", [(), STATE_ALIASES[:1], STATE_ALIASES[1:]])
def test_the_raw_call_refuses_a_state_that_is_not_aliased(aliases):
    check_refused("paged_kv_compress: state: the results must alias", aliases=aliases)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"next_n": N + 1}, "kv_score: expected"),
        ({"next_n": 0}, "next_n: expected"),
        ({"next_n": -1}, "next_n: expected"),
        ({"next_n": 1 << 31}, "next_n: expected"),
        ({"next_n": np.int32(N)}, "expected S64 but got S32"),
        ({"next_n": float(N)}, "expected S64 but got F64"),
        ({"compress_ratio": 128, "overlap": False}, "state.kv: expected"),
        (
            {"compress_ratio": 128},
            "no compiled configuration for .*compress_ratio 128, overlap true",
        ),
        ({"compress_ratio": 5}, "no compiled configuration for .*compress_ratio 5"),
        ({"compress_ratio": 0}, "no compiled configuration for .*compress_ratio 0"),
        ({"compress_ratio": np.int32(R)}, "expected S64 but got S32"),
        ({"kv_score_dtype": F32}, "kv_score: expected F32"),
        ({"state_dtype": BF16}, "state.kv: expected BF16"),
        ({"out_dtype": BF16}, "kv_comp: expected BF16"),
        ({"kv_score_dtype": np.uint8(10)}, "no compiled configuration for .*kv_score data type 10"),
        ({"state_dtype": np.uint8(255)}, "no compiled configuration for .*state data type 255"),
        ({"out_dtype": np.int64(F32)}, "expected U8 but got S64"),
        ({"state_format": np.uint8(2)}, "state_format: expected 0 .raw. or 1 .prefix."),
        ({"state_format": 1}, "expected U8 but got S64"),
        ({"state_format": np.uint8(1), "state_dtype": BF16}, "state_dtype: expected F32 .* BF16"),
        ({"geometry": 1 << 32}, "geometry: "),
        ({"geometry": -2}, "geometry: "),
        ({"overlap": False}, "no compiled configuration for .*overlap false"),
        ({"overlap": 1}, "expected PRED but got S64"),
        ({"layer": 0}, "kv_score: expected"),
        ({"layer": -2}, "kv_score: expected"),
        ({"layer": np.int32(-1)}, "expected S64 but got S32"),
    ],
    ids=str,
)
def test_the_raw_call_refuses_wrong_attributes(changed, text):
    check_refused(text, attributes=RAW_ATTRIBUTES | changed)


@pytest.mark.parametrize("name", RAW_ATTRIBUTES)
def test_the_raw_call_refuses_a_missing_attribute(name):
    attributes = {key: value for key, value in RAW_ATTRIBUTES.items() if key != name}
    count = len(RAW_ATTRIBUTES)
    check_refused(
        f"Wrong number of attributes: expected {count} attributes but got {count - 1}",
        attributes=attributes,
    )
