"""What records lose: errors of each format against its bound, and what ``rounding`` changes.

    python benchmarks/record_errors.py

Prints the two tables of docs/records.md, always the same ones. Bounds and scales are made here from
the formats' definitions, in float64, and not read from the records.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from jax_dsv4 import dequantize_records, init_records, make_cos_sin_cache, store_records

ROWS = 4096
KINDS = (  # format, D, options, bound in words
    ("f32", 512, {}, "0"),
    ("bf16", 512, {}, "half a step of bf16"),
    ("fp8", 512, {}, "half a step of e4m3; past 448 the distance to it"),
    (
        "fp8_ds_mla",
        512,
        {},
        "half a step of e4m3, times the scale; channels 448 to 511: half a step of bf16",
    ),
    (
        "fp8_block128",
        128,
        {},
        "half a step of e4m3, times the scale; and three roundings of f32",
    ),
    (
        "fp8_block128",
        128,
        {"scales": "power_of_two"},
        "half a step of e4m3, times the scale",
    ),
    ("mxfp4", 128, {}, "half a step of e2m1, times the scale"),
)


@dataclasses.dataclass(frozen=True)
class Code:
    """A small float."""

    mantissa_bits: int
    min_exponent: int  # of its normal numbers
    largest: float


BF16 = Code(7, -126, 2.0**127 * (2 - 2.0**-7))
E4M3 = Code(3, -6, 448.0)
E2M1 = Code(1, 0, 6.0)


def distributions(head_dim: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS, head_dim))
    heavy = rng.standard_t(2, (ROWS, head_dim))
    constant = rng.standard_normal((ROWS, head_dim // 32)).repeat(32, axis=1)
    named = {"N(0,1)": normal, "Student t": heavy, "blocks": constant}
    return {name: values.astype(np.float32) for name, values in named.items()}


def half_step(values: np.ndarray, scale: np.ndarray | float, code: Code) -> np.ndarray:
    """Half the distance of neighbouring codes at each value, times the scale.

    Past the largest code, the distance to it.
    """
    magnitudes = np.abs(values.astype(np.float64)) / scale
    exponents = np.maximum(np.frexp(magnitudes)[1] - 1, code.min_exponent)
    half = np.ldexp(0.5, exponents - code.mantissa_bits)
    return np.maximum(half, magnitudes - code.largest) * scale


def block_scales(values: np.ndarray, size: int, code: Code, power_of_two: bool) -> np.ndarray:
    """The scale of each value's block: amax over the largest code, in f32 or the power above it."""
    floor = np.float32(1e-4 if code is E4M3 else 6 * 2.0**-126)
    amax = np.abs(values).reshape(len(values), -1, size).max(-1)
    scale = (np.maximum(amax, floor) / np.float32(code.largest)).astype(np.float64)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return scale.repeat(size, axis=-1)


def bound(values: np.ndarray, format: str, scales: str = "f32") -> np.ndarray:
    """The largest error that the format allows each value; 0 in f32."""
    if format == "f32":
        return np.zeros(values.shape)
    if format == "bf16":
        return half_step(values, 1.0, BF16)
    if format == "fp8":
        return half_step(values, 1.0, E4M3)
    if format == "fp8_ds_mla":
        plain, rotated = values[:, :448], values[:, 448:]
        scale = block_scales(plain, 64, E4M3, power_of_two=True)
        parts = half_step(plain, scale, E4M3), half_step(rotated, 1.0, BF16)
        return np.concatenate(parts, axis=-1)
    if format == "mxfp4":
        return half_step(values, block_scales(values, 32, E2M1, power_of_two=True), E2M1)
    scale = block_scales(values, 128, E4M3, scales == "power_of_two")
    largest = half_step(values, scale, E4M3)
    # A scale that is no power of two rounds three times more, in f32: its reciprocal and both
    # products.
    return largest if scales == "power_of_two" else largest + 3 * 2.0**-24 * np.abs(values)


def stored(values, format: str, options: dict, **call):
    """A cache of one page that holds records of all values."""
    head_dim = values.shape[1]
    records = init_records(1, ROWS, head_dim=head_dim, format=format, **options)
    rows = np.arange(ROWS, dtype=np.int32)
    return store_records(values, rows, 4 * rows, records, **call)


def name_of(format: str, options: dict) -> str:
    return f"`{format}`" + "".join(f', `{name}="{option}"`' for name, option in options.items())


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def error_table() -> str:
    """Of each format and distribution: the largest error over the bound, and the rms error.

    The ratio is cut to four decimals, so that 1.0000 is 1. The other is the root mean square over
    records of the length of the error over the length of the record.
    """
    names = tuple(distributions(32))
    titles = [f"{name}: {what}" for name in names for what in ("largest / bound", "rms")]
    lines = [row("format, D", "bound", *titles), "|---|---|" + "---:|" * len(titles)]
    for format, head_dim, options, words in KINDS:
        cells = [f"{name_of(format, options)}, {head_dim}", words]
        for name, values in distributions(head_dim).items():
            records = stored(values, format, options, rounding="none")
            got = dequantize_records(records, np.arange(ROWS, dtype=np.int32))
            error = np.abs(np.asarray(got, np.float64) - values)
            limit = bound(values, format, **options)
            if np.any(error > limit):
                raise AssertionError(f"{format}, {name}: an error is past its bound")
            ratio = np.max(error / np.where(limit > 0, limit, 1))  # where it is 0, so is the error
            relative = np.linalg.norm(error, axis=1) / np.linalg.norm(values, axis=1)
            rms = np.sqrt(np.mean(relative**2))
            cells += [f"{np.floor(1e4 * ratio) / 1e4:.4f}", f"{100 * rms:.2f} %"]
        lines.append(row(*cells))
    return "\n".join(lines)


def rounding_table() -> str:
    """The share of the records' bytes that differ between two choices of ``rounding``.

    On N(0,1) values, through the norm (weights of bf16 around 1) and the rotation.
    """
    pairs = (("once", "none"), ("once", "model"), ("none", "model"))
    lines = [row("format, D", *(" / ".join(pair) for pair in pairs)), "|---|---:|---:|---:|"]
    config = {"qk_rope_head_dim": 64, "compress_rope_theta": 160000}
    table = make_cos_sin_cache(config, max_position=4 * ROWS)
    for format, head_dim, options, _ in KINDS:
        values = distributions(head_dim)["N(0,1)"]
        weight = 1 + 0.1 * np.random.default_rng(1).standard_normal(head_dim)
        call = {
            "norm_weight": weight.astype(ml_dtypes.bfloat16).astype(np.float32),
            "cos_sin_cache": table,
        }
        for hadamard in (False, True) if head_dim == 128 else (False,):
            pools = {}
            for rounding in ("once", "none", "model"):
                records = stored(
                    values, format, options, rounding=rounding, hadamard=hadamard, **call
                )
                pools[rounding] = np.asarray(records.pool)[0, : records._kind.page_bytes(ROWS)]
            shares = (np.mean(pools[one] != pools[other]) for one, other in pairs)
            name = f"{name_of(format, options)}, {head_dim}" + ", Hadamard" * hadamard
            lines.append(row(name, *(f"{100 * share:.1f} %" for share in shares)))
    return "\n".join(lines)


if __name__ == "__main__":
    print(error_table(), rounding_table(), sep="\n\n")
