"""The table of rotations: that of transformers, for both thetas.

rope.npz was made by ``python tests/test_rope.py`` with transformers 5.24.0 and torch 2.13.0 on a
CPU. It holds our configurations and positions, and what ``DeepseekV4RotaryEmbedding`` makes of
them: ``<config>.<rope>``, cosines and sines at ``positions``, and ``<config>.<rope>.inv_freq``.
"""

import copy
import functools
import json
import pathlib
import types

import numpy as np
import pytest

from jax_dsv4 import make_cos_sin_cache

HERE = pathlib.Path(__file__).parent
FILE = HERE / "rope.npz"
GOLDEN = HERE.parents[1] / "shared" / "golden" / "records_f32_bf16.npz"
YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "beta_fast": 32,
    "beta_slow": 1,
}
THETAS = {"rope_theta": 10000, "compress_rope_theta": 160000, "qk_rope_head_dim": 64}
FLASH = THETAS | {"head_dim": 512, "rope_scaling": YARN}
CONFIGS = {
    "flash": FLASH,
    "no yarn": THETAS | {"rope_scaling": None},
    "other yarn": {
        "rope_theta": 50000.5,
        "compress_rope_theta": 1234567.0,
        "qk_rope_head_dim": 64,
        "rope_scaling": YARN
        | {
            "factor": 7.3,
            "beta_fast": 20,
            "beta_slow": 2,
            "original_max_position_embeddings": 4096,
        },
    },
    "one step": FLASH | {"rope_scaling": YARN | {"beta_fast": 1e-3, "beta_slow": 1e-3}},
    "scaled": FLASH | {"rope_scaling": YARN | {"attention_factor": 0.7, "mscale": 1.0}},
}
SMALL = np.arange(65)
LARGE = np.array([1000, 4093, 65536, 131071, 524287, 999_983, 10**6])
ROPES = ("compress", "main")


def positions_of(name):
    return np.concatenate((SMALL, LARGE)) if name == "flash" else LARGE[:1]


def rotations_of_transformers(config, rope, positions):
    """Its inverse frequencies, and its cosines and sines in halves."""
    torch = pytest.importorskip("torch")
    package = "transformers.models.deepseek_v4"
    configuration = pytest.importorskip(f"{package}.configuration_deepseek_v4")
    modeling = pytest.importorskip(f"{package}.modeling_deepseek_v4")
    made = configuration.DeepseekV4Config(**copy.deepcopy(config))
    embedding = modeling.DeepseekV4RotaryEmbedding(made)
    cos, sin = embedding(torch.zeros(1), torch.as_tensor(positions)[None], layer_type=rope)
    inv_freq = getattr(embedding, f"{rope}_inv_freq")
    return inv_freq.numpy(), torch.cat((cos, sin), -1)[0].numpy()


@functools.cache
def table_of(name, rope):
    return make_cos_sin_cache(CONFIGS[name], positions_of(name)[-1] + 1, rope=rope)


def check(name, rope, inv_freq, rotations, steps):
    """Equal but for torch's cosines, which may be one step of f32 beside ours, of angles whose
    inverse frequencies are so many steps beside ours.
    """
    positions = positions_of(name)
    angles = positions[:, None].astype(np.float32) * inv_freq
    # A step of an inverse frequency, and the rounding of its angle.
    turned = np.tile(angles, 2) * (2.0**-22 if steps else 0)
    assert np.all(np.abs(table_of(name, rope)[positions] - rotations) <= turned + 1.2e-7)
    if not steps:
        want = np.concatenate((np.cos(angles, dtype=float), np.sin(angles, dtype=float)), axis=1)
        scale = (CONFIGS[name]["rope_scaling"] or {}).get("attention_factor", 1)
        want = want.astype(np.float32) * np.float32(scale if rope == "compress" else 1)
        np.testing.assert_array_equal(table_of(name, rope)[positions], want)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_that_of_transformers(name, rope):
    data = np.load(FILE)
    assert json.loads(str(data["configs"]))[name] == CONFIGS[name]
    np.testing.assert_array_equal(data["positions"], positions_of("flash"))
    # At 10^6 a step would turn a row by up to 0.06. There is none for the model's own thetas: torch
    # rounds most powers correctly, but not all.
    steps = 1 if name == "other yarn" else 0
    check(name, rope, data[f"{name}.{rope}.inv_freq"], data[f"{name}.{rope}"], steps)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_that_of_the_transformers_that_is_installed(name, rope):
    inv_freq, rotations = rotations_of_transformers(CONFIGS[name], rope, positions_of(name))
    check(name, rope, inv_freq, rotations, steps=1)  # another torch may take other powers


@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_those_of_f64_within_the_rounding_of_f32(rope):
    pair = np.arange(32)
    kept = 1 - np.clip((pair - 15) / 10, 0, 1)
    inv_freq = {
        "main": 10000.0 ** (-pair / 32),
        "compress": 160000.0 ** (-pair / 32) * (kept + (1 - kept) / 16),
    }[rope]
    positions = positions_of("flash")
    angles = positions[:, None] * inv_freq
    want = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    difference = np.abs(table_of("flash", rope)[positions] - want)
    # Half a step each of theta's power, its reciprocal, four more in YaRN, the angle, the cosine.
    steps = 3 if rope == "main" else 7
    assert np.all(difference <= np.tile(angles, 2) * steps * 2.0**-24 + 2.0**-24)
    assert difference[positions <= 64].max() < 1e-5


def test_the_layouts_hold_the_same_numbers():
    halves = make_cos_sin_cache(FLASH, 100)
    interleaved = make_cos_sin_cache(FLASH, 100, rope_layout="interleaved")
    assert halves.shape == interleaved.shape == (100, 64)
    assert halves.dtype == interleaved.dtype == np.float32
    np.testing.assert_array_equal(interleaved[:, ::2], halves[:, :32])
    np.testing.assert_array_equal(interleaved[:, 1::2], halves[:, 32:])


def test_it_is_the_table_of_the_golden_records():
    if not GOLDEN.exists():
        pytest.skip(f"no {GOLDEN}: other projects' bytes are not part of this repository")
    data = np.load(GOLDEN)
    # Its rows are positions of a table of theta 160000 without YaRN, whose angles are in f64.
    rows = np.array([92, 300, 1052, 1384, 1640, 1880, 2172, 2524, 2892, 3476, 5604, 7084])
    for layout in ("halves", "interleaved"):
        got = make_cos_sin_cache(CONFIGS["no yarn"], 7085, rope_layout=layout)[rows]
        difference = np.abs(got - data[f"table_{layout}"])
        assert np.all(difference <= rows[:, None] * 3 * 2.0**-24 + 2.0**-24)


# ---------------------------------------------------------------------------- how it is written


COMPRESS = {**YARN, "rope_type": "yarn", "rope_theta": 160000, "attention_factor": 1.0}
NESTED = {"main": {"rope_type": "default", "rope_theta": 10000}, "compress": COMPRESS}
SPELLINGS = {
    "saved by transformers": {
        "head_dim": 512,
        "partial_rotary_factor": 0.125,
        "qk_rope_head_dim": 64,
        "rope_parameters": NESTED,
    },
    "without qk_rope_head_dim": {
        "head_dim": 512,
        "partial_rotary_factor": 0.125,
        "rope_parameters": NESTED,
    },
    "with it in each entry": {
        "head_dim": 128,
        "rope_parameters": {
            rope: entry | {"partial_rotary_factor": 0.5} for rope, entry in NESTED.items()
        },
    },
    "one entry": THETAS | {"rope_parameters": YARN | {"rope_theta": 10000}},
    "both": FLASH | {"rope_parameters": NESTED, "rope_scaling": None},
    "defaults of yarn": THETAS
    | {"rope_scaling": {k: v for k, v in YARN.items() if not k.startswith("beta")}},
    "a rope_type of null": THETAS | {"rope_scaling": YARN | {"rope_type": None}},
    "attributes": types.SimpleNamespace(**FLASH),
    "attributes, nested": types.SimpleNamespace(qk_rope_head_dim=64, rope_parameters=NESTED),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_table(spelling, rope):
    want = make_cos_sin_cache(FLASH, 200, rope=rope)
    before = copy.deepcopy(SPELLINGS[spelling])
    np.testing.assert_array_equal(make_cos_sin_cache(SPELLINGS[spelling], 200, rope=rope), want)
    assert SPELLINGS[spelling] == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", ROPES)
def test_the_configuration_of_transformers_may_be_passed_itself(rope):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = transformers.DeepseekV4Config(**copy.deepcopy(FLASH))
    want = make_cos_sin_cache(FLASH, 200, rope=rope)
    for config in (made, made.to_dict(), json.loads(made.to_json_string())):
        np.testing.assert_array_equal(make_cos_sin_cache(config, 200, rope=rope), want)


def scaled(**changed):
    return FLASH | {"rope_scaling": {k: v for k, v in (YARN | changed).items() if v != ""}}


SCALING = "config.rope_scaling"
WRONG = [
    (FLASH, {"max_position": 0}, ValueError, "max_position: expected at least 1"),
    (FLASH, {"max_position": 2**24 + 1}, ValueError, "max_position: "),
    (FLASH, {"max_position": 1.5}, TypeError, "max_position: expected an integer"),
    (FLASH, {"rope": "yarn"}, ValueError, "rope: expected one of"),
    (FLASH, {"rope_layout": "neox"}, ValueError, "rope_layout: expected one of"),
    ({}, {}, ValueError, "config.qk_rope_head_dim: missing"),
    (None, {}, ValueError, "config.qk_rope_head_dim: missing"),
    (FLASH | {"qk_rope_head_dim": 128}, {}, ValueError, "config.qk_rope_head_dim: expected 64"),
    (
        {"head_dim": 128, "partial_rotary_factor": 0.125},
        {},
        ValueError,
        r"config.partial_rotary_factor \* head_dim: expected 64, got 16",
    ),
    ({"partial_rotary_factor": 0.125}, {}, ValueError, "config.head_dim: missing"),
    ({"qk_rope_head_dim": 64}, {}, ValueError, "config.compress_rope_theta: missing"),
    ({"qk_rope_head_dim": 64}, {"rope": "main"}, ValueError, "config.rope_theta: missing"),
    (FLASH | {"compress_rope_theta": "1"}, {}, TypeError, "config.compress_rope_theta: "),
    (FLASH | {"compress_rope_theta": 1}, {}, ValueError, "config.compress_rope_theta: .* above 1"),
    (FLASH | {"rope_scaling": 16}, {}, TypeError, f"{SCALING}: expected a mapping"),
    (scaled(type="longrope"), {}, ValueError, f"{SCALING}.rope_type: expected one of"),
    (scaled(type=["yarn"]), {}, ValueError, f"{SCALING}.rope_type: expected one of"),
    (scaled(type=""), {}, ValueError, f"{SCALING}.factor: not a field of rope_type 'default'"),
    (scaled(truncate=False), {}, ValueError, f"{SCALING}.truncate: not a field of"),
    (scaled(factor=""), {}, ValueError, f"{SCALING}.factor: missing"),
    (scaled(factor=True), {}, TypeError, f"{SCALING}.factor: expected a number"),
    (
        scaled(factor=float("nan")),
        {},
        ValueError,
        f"{SCALING}.factor: expected a number of f32 above 0",
    ),
    (
        scaled(original_max_position_embeddings=""),
        {},
        ValueError,
        f"{SCALING}.original_max_position_embeddings: missing",
    ),
    (scaled(beta_fast=0), {}, ValueError, f"{SCALING}.beta_fast: "),
    (scaled(beta_slow=-1), {}, ValueError, f"{SCALING}.beta_slow: "),
    (scaled(attention_factor=0), {}, ValueError, f"{SCALING}.attention_factor: "),
    *(  # not numbers of f32, or 0 there
        (scaled(**{field: value}), {}, ValueError, f"{SCALING}.{field}: expected a number of f32")
        for field in ("factor", "attention_factor", "beta_fast", "original_max_position_embeddings")
        for value in (1e39, 1e-50, 10**400)
    ),
    (FLASH | {"compress_rope_theta": 1 + 1e-15}, {}, ValueError, "config.compress_rope_theta: "),
    (FLASH | {"qk_rope_head_dim": [64]}, {}, TypeError, "config.qk_rope_head_dim: expected a num"),
    (
        FLASH | {"rope_parameters": {"main": NESTED["main"]}},
        {},
        ValueError,
        "config.rope_parameters.compress: missing",
    ),
    (
        FLASH | {"rope_parameters": {"main": {}, "compress": YARN}},
        {},
        ValueError,
        "config.rope_parameters.compress.rope_theta: missing",
    ),
]


@pytest.mark.parametrize(("config", "arguments", "error", "text"), WRONG)
def test_what_is_wrong_is_named(config, arguments, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make_cos_sin_cache(config, **{"max_position": 8} | arguments)


if __name__ == "__main__":
    arrays = {"configs": np.array(json.dumps(CONFIGS)), "positions": positions_of("flash")}
    for name, config in CONFIGS.items():
        for rope in ROPES:
            key = f"{name}.{rope}"
            arrays[f"{key}.inv_freq"], arrays[key] = rotations_of_transformers(
                config, rope, positions_of(name)
            )
    np.savez_compressed(FILE, **arrays)
