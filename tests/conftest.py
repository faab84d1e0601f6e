"""The devices that numerical tests run on."""

import itertools
import os
import pathlib
import sys

# For the tests on meshes; before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

# For examples/. Last: where jax_dsv4 is installed, the folder of its source is not under test.
sys.path.append(str(pathlib.Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="run at most so many cases of each test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave of each test as many cases as ``--cases`` says, evenly spaced, of those selected."""
    most = config.getoption("cases")
    if most is None:
        return
    kept, left_out = [], []
    for _, group in itertools.groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        chosen = {i * len(cases) // most for i in range(most)} if len(cases) > most else None
        for i, case in enumerate(cases):
            (kept if chosen is None or i in chosen else left_out).append(case)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def gpu() -> jax.Device:
    """An NVIDIA GPU; tests that use it carry the gpu mark."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        reason = f"JAX has no CUDA device: {error}"
    if os.environ.get("JAX_DSV4_REQUIRE_GPU") == "1":
        pytest.fail(f"JAX_DSV4_REQUIRE_GPU=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request) -> jax.Device:
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    return jax.devices("cpu")[0]


@pytest.fixture
def on_device(device):
    """Runs a test on each device, as JAX's default."""
    with jax.default_device(device):
        yield device
