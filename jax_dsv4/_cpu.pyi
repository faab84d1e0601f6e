from typing import Any

FFI_VERSION: tuple[int, int]
SHAPES: list[tuple[int, int, bool, list[tuple[int, int, int, bool, bool]]]]
STATE_FORMATS: list[tuple[str, list[str]]]
DTYPES: list[tuple[str, str, str]]
TARGET_NAME: str

def handler() -> Any: ...
