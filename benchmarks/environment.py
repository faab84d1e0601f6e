"""What a figure was measured on, for its record."""

from __future__ import annotations

import shutil
import subprocess

import jax


def describe_environment(commit: str | None = None) -> dict[str, str]:
    """Device, versions, and the commit: given, or that of the git checkout at hand."""

    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    drivers = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": jax.devices()[0].device_kind,
        "driver": drivers.partition("\n")[0],
        "cuda": output("nvcc", "--version").rpartition("release ")[2].partition(",")[0],
        "jax": jax.__version__,
        "commit": commit or output("git", "rev-parse", "--short", "HEAD"),
    }
