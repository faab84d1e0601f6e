"""From positions of a sequence to rows of a paged pool."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Pool(NamedTuple):
    """Where a call's pages are in an array ``[all pages, page_size, S]``."""

    first_page: Array | int  # of the layer
    num_pages: int  # of the layer; none where it does not exist
    page_size: int
    nowhere: int  # the number of all pages

    def find_rows(self, tables: Array, positions: Array) -> tuple[Array, Array]:
        """(page, slot) of each of ``positions`` [B, rows] in ``tables`` [B, max_pages]."""
        logical = positions // self.page_size
        page = jnp.take_along_axis(tables, logical, axis=1, mode="fill", fill_value=-1)
        return self._rows_on(page, positions)

    def find_rows_of(self, tables: Array, requests: Array, positions: Array) -> tuple[Array, Array]:
        """The same of ``positions``, each of one of ``requests``, which are of their shape."""
        logical = positions // self.page_size
        page = tables.at[requests, logical].get(mode="fill", fill_value=-1)
        return self._rows_on(page, positions)

    def _rows_on(self, page: Array, positions: Array) -> tuple[Array, Array]:
        exists = (positions >= 0) & (page >= 0) & (page < self.num_pages)
        return jnp.where(exists, self.first_page + page, self.nowhere), positions % self.page_size


def pool_of(array: Array, layer: Array) -> tuple[Array, Pool]:
    """``array`` [(layers,) num_pages, page_size, S] by pages; and where those of ``layer`` are."""
    num_pages, page_size = array.shape[-3:-1]
    pages = array.reshape(-1, *array.shape[-2:])
    first_page: Array | int = 0
    if layer.size:
        exists = (layer[0] >= 0) & (layer[0] < array.shape[0])
        # The pages of a layer that does not exist are past all of them.
        first_page = jnp.where(exists, layer[0] * num_pages, pages.shape[0])
    return pages, Pool(first_page, num_pages, page_size, pages.shape[0])
