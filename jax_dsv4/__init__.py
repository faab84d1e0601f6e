"""DeepSeek-V4's paged KV compressor for JAX."""

import importlib.util

if importlib.util.find_spec("jax_dsv4._cpu") is None:
    raise ImportError(
        "jax_dsv4 was imported from a folder without its compiled modules: "
        f"{__path__[0]}. This happens when Python runs from the source folder of a plain "
        "`pip install .`; run it from another folder, or install with `pip install -e .`"
    )

from jax_dsv4._ffi import EXPORT_DISABLED_CHECKS
from jax_dsv4.decode import paged_kv_compress, raw_to_prefix
from jax_dsv4.state import (
    STATE_FORMATS,
    CompressorState,
    init_state,
    layer_tables,
    live_pages,
    num_compressed,
    pages_needed,
)

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "STATE_FORMATS",
    "CompressorState",
    "init_state",
    "layer_tables",
    "live_pages",
    "num_compressed",
    "paged_kv_compress",
    "pages_needed",
    "raw_to_prefix",
]
