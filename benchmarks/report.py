"""README's table of times, and plots, from measured JSON lines.

    python benchmarks/report.py benchmarks/h200.jsonl
    python benchmarks/report.py benchmarks/cpu.jsonl

Rewrites the PNGs beside the results, which are of one card or one CPU, and of a card the table in
README.md. Needs matplotlib.
"""

from __future__ import annotations

import json
import pathlib
import sys

README = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- times -->", "<!-- /times -->"
HCA = {
    "ratio": 128,
    "overlap": False,
    "head_dim": 512,
    "next_n": 4,
    "state": "float32",
    "kv_score": "bfloat16",
    "out": "bfloat16",
    "format": "raw",
    "warm": False,
    "layers": False,
    "max_pages": 0,
    "variant": "default",
}
CSA = {"ratio": 4, "overlap": True}
PREFIX = {"format": "prefix"}
# (label, what the rows are selected by), of the table and the plots
LINES = [
    ("raw, every request completes a window", {"regime": "all emit"}),
    ("raw, 1 in 32 completes one", {"regime": "distributed"}),
    ("raw, none does", {"regime": "no hit"}),
    ("prefix, every request completes a window", {"regime": "all emit"} | PREFIX),
    (
        "prefix, the same, one table for all calls",
        {"regime": "all emit", "layers": True} | PREFIX,
    ),
    ("prefix, 1 in 32 completes one", {"regime": "distributed"} | PREFIX),
    ("prefix, none does", {"regime": "no hit"} | PREFIX),
    (
        "raw, one row at a time, 4 warps",
        {"regime": "all emit", "variant": "row at a time, 4 warps"},
    ),
    (
        "raw, one row at a time, 1 warp",
        {"regime": "all emit", "variant": "row at a time, 1 warps"},
    ),
    ("raw, jitted jnp, which copies the pool", {"regime": "all emit", "variant": "jnp"}),
    ("R 4, raw", {"regime": "all emit"} | CSA),
    ("R 4, prefix", {"regime": "all emit"} | CSA | PREFIX),
]


def read_rows(path: pathlib.Path) -> list[dict]:
    """The measured points of one card."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cards = sorted({row["device"] for row in rows})
    if len(cards) != 1:
        raise SystemExit(f"{path}: expected the times of one card, got {cards}")
    return rows


def read_calls(path: pathlib.Path) -> list[dict]:
    """Those of calls; of a point that was measured again, the last one counts."""
    rows = [row for row in read_rows(path) if "regime" in row]
    for row in rows:  # what older records leave out
        row.setdefault("overlap", row["ratio"] == 4)
    return rows


def select(rows: list[dict], wanted: dict) -> dict[int, dict]:
    """By batch."""
    wanted = HCA | wanted
    return {r["batch"]: r for r in rows if all(r[key] == x for key, x in wanted.items())}


def table(rows: list[dict]) -> str:
    """A line is left out where nothing of it was measured."""
    selected = {label: select(rows, wanted) for label, wanted in LINES}
    lines = {label: line for label, line in selected.items() if line}
    batches = sorted(set().union(*lines.values()))
    cells = [["B", *map(str, batches)], ["---"] * (1 + len(batches))]
    for label, line in lines.items():
        cells.append([label, *(f"{line[b]['us']:.1f}" if b in line else "" for b in batches)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def plot(rows: list[dict], key: str, title: str, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), dpi=80)
    for label, wanted in LINES:
        line = sorted(select(rows, wanted).items())
        if line and "ratio" not in wanted:
            axes.plot([b for b, _ in line], [r[key] for _, r in line], marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if key == "us" else "linear")
    axes.set_xlabel("requests")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    path = pathlib.Path(sys.argv[1])
    rows = read_calls(path)
    is_card = "percent_of_read_ceiling" in rows[0]
    if is_card:
        before, _, rest = README.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"README.md has no section between {BEGIN} and {END}")
        README.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")
    what = f"{rows[0]['device']}, R 128, D 512, next_n 4, kv_score bf16, state f32"
    plot(rows, "us", f"us per call ({what})", path.with_name(f"{path.stem}_us.png"))
    ceiling = "read" if is_card else "copy"
    plot(
        rows,
        f"percent_of_{ceiling}_ceiling",
        f"% of the {ceiling} ceiling ({what})",
        path.with_name(f"{path.stem}_percent.png"),
    )


if __name__ == "__main__":
    main()
