"""The golden run: three prompts, and the tokens, logits and records that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from examples.engine.model import CSA, HCA
from examples.engine.server import Draft, Engine, Options, Request
from examples.engine.weights import TINY, load_tiny
from jax_dsv4 import dequantize_records

NEW_TOKENS = 130  # of each prompt
MAX_LOGITS_ERROR, MAX_RECORDS_ERROR = 1e-3, 1e-4


class Golden(NamedTuple):
    """What ``tiny.npz`` holds beside weights."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[np.ndarray]  # [steps, vocab] f32, at ``steps``
    steps: list[int]
    records: dict[str, np.ndarray]  # of the second prompt and its tokens, by layer and compressor


def load_golden() -> Golden:
    """Read it."""
    with np.load(TINY) as file:
        prompts, tokens = (
            [file[f"{name}{i}"].tolist() for i in range(3)] for name in ("prompt", "tokens")
        )
        logits = [file[f"logits{i}"] for i in range(3)]
        start = "records1."
        records = {n.removeprefix(start): file[n] for n in file.files if n.startswith(start)}
        steps = json.loads(bytes(file["meta"]))["kept_steps"]
    return Golden(prompts, tokens, logits, steps, records)


def spoilt_drafts(golden: Golden, rng: np.random.Generator, right: float = 0.6) -> Draft:
    """The tokens that will come, of which some are wrong."""
    known = [p + t for p, t in zip(golden.prompts, golden.tokens, strict=True)]

    def draft(tokens: Sequence[int], most: int) -> list[int]:
        for sequence in known:
            if sequence[: len(tokens)] == tokens:
                ahead = sequence[len(tokens) : len(tokens) + most]
                return [t if rng.random() < right else (t + 1) % 256 for t in ahead]
        return []

    return draft


class Found(NamedTuple):
    """What a comparison found."""

    equal: int  # tokens
    total: int
    logits_error: float

    @property
    def right(self) -> bool:
        """Whether it is what the golden run has."""
        return self.equal == self.total and self.logits_error < MAX_LOGITS_ERROR


def compare(golden: Golden, requests: Sequence[Request], which: Sequence[int] = (0, 1, 2)) -> Found:
    """Finished requests for the prompts ``which``, against the golden run."""
    equal, errors = 0, [0.0]
    for i, request in zip(which, requests, strict=True):
        equal += sum(a == b for a, b in zip(request.output, golden.tokens[i], strict=False))
        if request.logits is not None and len(request.logits) == NEW_TOKENS:
            got = np.stack(request.logits)[golden.steps]
            errors.append(float(np.abs(got - golden.logits[i]).max()))
    return Found(equal, NEW_TOKENS * len(which), max(errors))


def compare_records(golden: Golden, engine: Engine) -> float:
    """The largest error of a record, of all layers, after the second prompt and its tokens."""
    # More than the last step may bring: the request does not end, and keeps its pages.
    request = engine.submit(golden.prompts[1], NEW_TOKENS + engine.options.next_n)
    while len(request.output) < NEW_TOKENS:
        engine.step()
    table = engine.groups[0].pages.tables().records[request.slot]
    errors = []
    for name, want in golden.records.items():
        layer, part = name.removeprefix("layer").split(".")
        ratio = engine.config.compress_ratios[int(layer)]
        if ratio == HCA:
            cache = engine.caches.hca
        else:
            cache = engine.caches.csa[0 if part == "compressor" else 1]
        windows, size = np.arange(len(want)), engine.options.page_tokens // ratio
        slots = table[windows // size] * size + windows % size
        place = engine.config.layers_of(ratio).index(int(layer))
        got = dequantize_records(cache.records, slots.astype(np.int32), layer=place)
        errors.append(float(np.abs(np.asarray(got) - want).max()))
    engine.cancel(request)
    return max(errors)


def check() -> Iterator[tuple[str, bool]]:
    """Everything, step by step: what was found, and whether it is right."""
    golden, (config, params) = load_golden(), load_tiny()

    def describe(name: str, found: Found) -> tuple[str, bool]:
        text = f"{found.equal} of {found.total} tokens, logits within {found.logits_error:.1e}"
        return f"{name}: {text}", found.right

    whole = Engine(config, params, Options(batch=3, chunk=290))
    requests = whole.generate(golden.prompts, NEW_TOKENS, logits=True)
    yield describe("whole prompts", compare(golden, requests))
    for state_format in ("raw", "prefix"):
        draft = spoilt_drafts(golden, np.random.default_rng(0))
        options = Options(batch=3, chunk=64, drafts=3, state_format=state_format)
        engine = Engine(config, params, options, draft=draft)
        for name in ("chunks and drafts, all in one batch", "the same, behind cached prefixes"):
            requests = engine.generate(golden.prompts, NEW_TOKENS, logits=True)
            yield describe(f"{name}, state {state_format}", compare(golden, requests))
        reused, stats = [request.reused for request in requests], engine.stats
        drafts = f"{stats.accepted} of {stats.drafts} drafts accepted"
        right = reused == [0, CSA * 32, CSA * 32] and 0 < stats.accepted < stats.drafts
        yield f"{drafts}; tokens of prefixes reused: {reused}", right
        error = compare_records(golden, engine)
        yield f"records within {error:.1e}", error < MAX_RECORDS_ERROR
        engine.drop_prefixes()
        yield f"pages in use at the end: {engine.pages_in_use()}", engine.pages_in_use() == 0
