"""README and docs/: their code runs, their links lead somewhere, and README keeps its form."""

import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
import support_matrix
from checks import with_or_without_cuda

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/operation.md",
    "docs/state.md",
    "docs/records.md",
    "docs/transforms.md",
    "docs/engine.md",
    "docs/prefill.md",
    "docs/serving.md",
    "docs/troubleshooting.md",
    "docs/developing.md",
)
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
NEEDS_8_DEVICES = "# Needs 8 devices."
NEEDS_ORBAX = "# Needs orbax-checkpoint."
MAX_README_LINES = 150


class Snippet(NamedTuple):
    """A Python snippet, by the heading that it is under."""

    page: str
    heading: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}, {self.heading}"


def list_snippets(page, text):
    heading = ""
    for block in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```", text, re.M | re.S):
        title, language, code = block.groups()
        if title:
            heading = title
        elif language == "python":
            yield Snippet(page, heading, code)


SNIPPETS = [snippet for page, text in TEXTS.items() for snippet in list_snippets(page, text)]


def run_alone(snippet):
    """The names that a snippet leaves behind."""
    names = {"__name__": "snippet"}
    with jax.default_device(jax.devices("cpu")[0]):
        exec(compile(snippet.code, str(snippet), "exec"), names)
    return names


@with_or_without_cuda
@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_every_snippet_runs_by_itself(snippet):
    if NEEDS_8_DEVICES in snippet.code and jax.device_count() < 8:
        pytest.skip(f"needs 8 devices of one kind, JAX's default has {jax.device_count()}")
    if NEEDS_ORBAX in snippet.code:
        pytest.importorskip("orbax.checkpoint")
    run_alone(snippet)


def test_every_python_block_is_found():
    blocks = sum(text.count("```python\n") for text in TEXTS.values())
    assert len(SNIPPETS) == blocks > 10


def test_the_first_snippet_completes_the_windows_that_it_says():
    names = run_alone(SNIPPETS[0])
    first_values = np.asarray(names["kv_comp"][:, 0, 0] != 0)
    np.testing.assert_array_equal(np.flatnonzero(first_values), [0, 3, 5])


def test_the_readme_lists_the_compiled_configurations():
    expected = support_matrix.support_matrix()
    matrix = support_matrix.matrix_in(TEXTS["README.md"])
    assert matrix == expected, (
        f"expected in README.md, between {support_matrix.BEGIN} and {support_matrix.END} "
        f"(python tests/support_matrix.py writes it there):\n\n{expected}\n"
    )


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= MAX_README_LINES


def test_every_page_is_tested_and_linked_from_the_readme():
    docs = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert docs == set(PAGES) - {"README.md"}
    assert docs <= set(re.findall(r"\]\(([^)#]+)", TEXTS["README.md"]))


def anchors_of(text):
    """What GitHub makes of headings."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", without_code, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", TEXTS[page])
    in_a_checkout = (ROOT / "CMakeLists.txt").exists()
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        name = str(target.resolve().relative_to(ROOT.resolve()))
        if in_a_checkout or name in PAGES:
            assert target.exists(), f"{page}: no {path}"
        if anchor:
            assert anchor in anchors_of(TEXTS[name]), f"{page}: no #{anchor} in {name}"
