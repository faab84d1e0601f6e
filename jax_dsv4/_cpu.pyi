from typing import Any

FFI_VERSION: tuple[int, int]
HANDLERS: dict[str, Any]
KINDS: list[tuple[int, int, bool, list[tuple[int, int, int, int]]]]
RECORDS: list[tuple[str, int]]
STATE_FORMATS: list[tuple[str, list[str]]]
DTYPES: list[tuple[str, str, str]]
VECTOR_LEVELS: list[str]

def set_vector_level(level: int, /) -> None: ...
