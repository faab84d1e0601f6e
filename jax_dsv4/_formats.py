"""The formats of records: what a record's bytes are, and how they lie on a page."""

from __future__ import annotations

import dataclasses

ROPE_DIM = 64  # the last channels of a record, which are rotated
ROPE_LAYOUTS = ("halves", "interleaved")  # of a row of the table


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """A format, and the choices that its quantiser leaves.

    Attributes:
      name: a member of ``RECORD_FORMATS``.
      head_dim: D, channels of a record.
      scales: of ``"fp8_block128"``; of all others ``"ue8m0"`` or nothing.
      scale_floor: of ``"fp8_ds_mla"``.
    """

    name: str
    head_dim: int
    scales: str = "f32"
    scale_floor: bool = False

    @property
    def data_bytes(self) -> int:
        """Bytes of a record's data, which lie in front of all scales of the page."""
        return {
            "f32": 4 * self.head_dim,
            "bf16": 2 * self.head_dim,
            "fp8": self.head_dim,
            "fp8_ds_mla": self.head_dim + ROPE_DIM,
            "fp8_block128": self.head_dim,
            "mxfp4": self.head_dim // 2,
        }[self.name]

    @property
    def scale_bytes(self) -> int:
        """Bytes of a record's scales, padding included."""
        return {
            "fp8_ds_mla": 8,
            "fp8_block128": self.head_dim // 128 * 4,
            "mxfp4": self.head_dim // 32,
        }.get(self.name, 0)

    @property
    def is_quantized(self) -> bool:
        """Whether a record holds less than bf16 does."""
        return self.name not in ("f32", "bf16")

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether scales are powers of two."""
        return self.name != "fp8_block128" or self.scales != "f32"

    def page_bytes(self, page_size: int) -> int:
        """How many bytes of a page hold records: its least stride."""
        return page_size * (self.data_bytes + self.scale_bytes)
