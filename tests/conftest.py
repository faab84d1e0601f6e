"""The devices that numerical tests run on."""

import os

import jax
import pytest


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
