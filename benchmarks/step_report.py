"""A bar chart of the time of a whole decode step, from the JSON lines of ``step.py``.

    python benchmarks/step_report.py results/step.jsonl

Writes a PNG beside the results, which are of one card; of a point that was measured again, the last
one counts. Needs matplotlib.
"""

from __future__ import annotations

import pathlib
import sys

from report import read_rows

BARS = [  # (label, variant, records, colour)
    ("jnp behind the calls, bf16 records", "jnp", "bf16", "tab:gray"),
    ("fused, bf16", "fused", "bf16", "tab:blue"),
    ("jnp behind the calls, fp8 records", "jnp", "fp8", "silver"),
    ("fused, fp8", "fused", "fp8", "tab:cyan"),
]
VALUES = ("values", None)
WIDTH = 0.2


def by_bar(rows: list[dict]) -> dict[tuple, dict[tuple, float]]:
    """Microseconds a step with all layers of a kind in one array: of (variant, records) by group.

    A group is of (format, batch).
    """
    found: dict[tuple, dict[tuple, float]] = {}
    for row in rows:
        if row["layout"] == "layers":
            bar = found.setdefault((row["variant"], row["records"]), {})
            bar[row["format"], row["batch"]] = row["step_us"]
    return found


def plot(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    found = by_bar(rows)
    groups = sorted(set().union(*found.values()))
    figure, axes = plt.subplots(figsize=(9, 4), dpi=80)
    bars = [bar for bar in BARS if bar[1:3] in found]
    for i, (label, variant, records, colour) in enumerate(bars):
        times = found[variant, records]
        places = {g: groups.index(g) + WIDTH * (i - (len(bars) - 1) / 2) for g in times}
        drawn = axes.bar(
            list(places.values()), list(times.values()), WIDTH, label=label, color=colour
        )
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    values = found.get(VALUES, {})
    if values:
        axes.hlines(
            list(values.values()),
            [groups.index(g) - WIDTH * len(bars) / 2 for g in values],
            [groups.index(g) + WIDTH * len(bars) / 2 for g in values],
            colors="black",
            linestyles="dotted",
            label="values alone, no records",
        )
    axes.set_xticks(range(len(groups)), [f"{format}, B = {batch}" for format, batch in groups])
    card, jax = rows[0]["device"], rows[0]["jax"]
    axes.set_title(f"us per decode step of DeepSeek-V4-Flash ({card}, jax {jax})", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    path = pathlib.Path(sys.argv[1])
    plot(read_rows(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
