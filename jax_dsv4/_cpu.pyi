from typing import Any

FFI_VERSION: tuple[int, int]
SHAPES: list[tuple[int, int, bool, list[tuple[int, int, int, bool]]]]
DTYPES: list[tuple[str, str, str]]

def handlers() -> dict[str, Any]: ...
