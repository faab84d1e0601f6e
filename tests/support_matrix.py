"""README's support matrix, from the list of compiled configurations.

``python tests/support_matrix.py`` rewrites it.
"""

import pathlib

from jax_dsv4._config import DTYPES, KINDS, STATE_DTYPES

PATH = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- support matrix -->", "<!-- /support matrix -->"
_SHORT = {"bfloat16": "bf16", "float32": "f32"}


def support_matrix() -> str:
    """One row per kind; per pair of operand dtypes, the dtypes that ``kv_comp`` may have. Below,
    the dtypes of a state by format.
    """
    operands = dict.fromkeys((dtypes.kv_score, dtypes.state) for dtypes in DTYPES)
    outs = [
        ", ".join(_SHORT[dtypes.out] for dtypes in DTYPES if dtypes[:2] == pair)
        for pair in operands
    ]
    heads = [f"`kv_score` {_SHORT[new]}, `state` {_SHORT[state]}" for new, state in operands]
    rows = [
        ["`head_dim`", "`compress_ratio`", "windows", *heads],
        ["---"] * (3 + len(heads)),
        *(
            [
                str(kind.head_dim),
                str(kind.compress_ratio),
                "overlapping" if kind.overlap else "disjoint",
                *outs,
            ]
            for kind in KINDS
        ),
    ]
    formats = [
        f'{" or ".join(_SHORT[dtype] for dtype in dtypes)} in format `"{name}"`'
        for name, dtypes in STATE_DTYPES.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\nA `state` is {', '.join(formats)}."


def matrix_in(readme: str) -> str | None:
    """The text between the two marks, or None without them."""
    _, begin, rest = readme.partition(BEGIN)
    matrix, end, _ = rest.partition(END)
    return matrix.strip() if begin and end else None


if __name__ == "__main__":
    text = PATH.read_text()
    matrix = matrix_in(text)
    if matrix is None:
        raise SystemExit(f"{PATH} has no section between {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PATH.write_text(f"{before}{BEGIN}\n\n{support_matrix()}\n\n{END}{after}")
