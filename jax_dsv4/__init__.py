"""DeepSeek-V4's paged KV compressor for JAX."""

import importlib.metadata
import importlib.util

if importlib.util.find_spec("jax_dsv4._cpu") is None:
    raise ImportError(
        "jax_dsv4 was imported from a folder without its compiled modules: "
        f"{__path__[0]}. This happens when Python runs from the source folder of a plain "
        "`pip install .`; run it from another folder, or install with `pip install -e .`"
    )

from jax_dsv4._op import EXPORT_DISABLED_CHECKS
from jax_dsv4.compressor import (
    CacheTables,
    Compressor,
    CompressorCache,
    decode_records,
    ragged_records,
)
from jax_dsv4.decode import paged_kv_compress, raw_to_prefix
from jax_dsv4.pages import OutOfPages, PagePool, SlotTables, live_pages, pages_needed, slot_tables
from jax_dsv4.ragged import LiveRows, live, ragged_kv_compress
from jax_dsv4.records import (
    RECORD_FORMATS,
    RecordCache,
    dequantize_records,
    init_records,
    store_records,
)
from jax_dsv4.rope import make_cos_sin_cache
from jax_dsv4.state import STATE_FORMATS, CompressorState, init_state
from jax_dsv4.windows import (
    CompletedWindows,
    RaggedWindows,
    completed_windows,
    num_compressed,
    ragged_windows,
)

__version__ = importlib.metadata.version("jax_dsv4")

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "RECORD_FORMATS",
    "STATE_FORMATS",
    "CacheTables",
    "CompletedWindows",
    "Compressor",
    "CompressorCache",
    "CompressorState",
    "LiveRows",
    "OutOfPages",
    "PagePool",
    "RaggedWindows",
    "RecordCache",
    "SlotTables",
    "__version__",
    "completed_windows",
    "decode_records",
    "dequantize_records",
    "init_records",
    "init_state",
    "live",
    "live_pages",
    "make_cos_sin_cache",
    "num_compressed",
    "paged_kv_compress",
    "pages_needed",
    "ragged_kv_compress",
    "ragged_records",
    "ragged_windows",
    "raw_to_prefix",
    "slot_tables",
    "store_records",
]
