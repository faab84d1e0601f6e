"""What the compressors cost in a step: profiles, and steps timed with and without their calls."""

from __future__ import annotations

import collections
import concurrent.futures
import gzip
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.engine.model import Batch, Config
from examples.engine.server import Engine, Options, Part, Request
from examples.engine.weights import make_random

CALL = re.compile(
    r'^\s*(?:ROOT )?%(\S+) = .*custom_call_target="jax_dsv4_(\w+)".*op_name="([^"]*)"'
)
KERNEL = re.compile(r"jax_dsv4.*?([a-z_]+_kernel)")  # by its function, mangled or not
ROUNDS, SECONDS = 5, 0.2  # a step is run over and over, in so many rounds of so long


def time_steps(engine: Engine, programs: Sequence[Any], batch: Batch) -> np.ndarray:
    """[programs, ROUNDS] seconds per step; in a round the programs take turns.

    They work on a copy of the caches.
    """
    caches, batch = jax.device_put((jax.tree.map(jnp.copy, engine.caches), batch))
    times: list[list[float]] = [[] for _ in programs]
    runs = 1
    for i in range(2 + ROUNDS):  # the first ones warm up, and say how many runs are a round
        for program, own in zip(programs, times, strict=True):
            jax.block_until_ready(caches)
            start = time.perf_counter()
            for _ in range(runs):
                caches, *_ = program(engine.params, caches, batch)
            jax.block_until_ready(caches)
            own.append((time.perf_counter() - start) / runs)
        if i == 1:
            runs = max(int(SECONDS / max(own[1] for own in times)), 1)
    return np.array(times)[:, 2:]


def time_kernels(
    engine: Engine, program: Any, batch: Batch, runs: int = 20
) -> collections.Counter[str]:
    """Microseconds per step of each of our kernels, and of all; none where there is no GPU.

    From a profile, which may not see kernels in command buffers: without these
    (`XLA_FLAGS=--xla_gpu_enable_command_buffer=`) it sees all.
    """
    caches, batch = jax.device_put((jax.tree.map(jnp.copy, engine.caches), batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(runs):
                caches, *_ = program(engine.params, caches, batch)
            jax.block_until_ready(caches)
        path = next(pathlib.Path(folder).rglob("perfetto_trace.json.gz"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("name") in ("process_name", "thread_name")
    }
    processes = {pid: name for (kind, pid, _), name in names.items() if kind == "process_name"}
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        stream = names.get(("thread_name", event.get("pid"), event.get("tid")), "")
        if "dur" in event and "GPU" in processes.get(event["pid"], "") and "Stream" in stream:
            kernel = KERNEL.search(event["name"])
            times["all"] += event["dur"] / runs
            times[kernel[1] if kernel else "others"] += event["dur"] / runs
    return times


def describe_costs(engine: Engine, name: str, batch: Batch, *, beside_jnp: bool = False) -> str:
    """What compressors take of a step, as lines of text: as they are, and in jnp.

    It is the difference to the same program without their calls, round by round: its median, and
    in brackets the smallest and the largest. Then, from profiles, the kernels of these programs.
    """
    kinds: dict[str, dict[str, Any]] = {"compressors": {}}
    if beside_jnp:
        kinds["compressors in jitted jnp"] = {"implementation": "xla"}
    changes = [*kinds.values(), {"compressors": False}]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # on a GPU, compiling takes the time
        own = pool.map(lambda change: engine.compile(batch, **change), changes[1:])
        programs = [engine.program(batch), *own]
    *steps, rest = time_steps(engine, programs, batch) * 1e6
    calls = sum(ratio > 0 for ratio in engine.config.compress_ratios)
    lines = []
    for kind, step in zip(kinds, steps, strict=True):
        own = step - rest
        part = np.median(own) / np.median(step)
        lines.append(
            f"{name}: a step {np.median(step):.0f} us; {kind} {np.median(own):.1f} us "
            f"({own.min():.1f} to {own.max():.1f}) in {calls} calls, {part:.1%} of it"
        )
    for kind, program in zip((*kinds, "no compressors"), programs, strict=True):
        if times := time_kernels(engine, program, batch):
            kernels = (f"{kernel} {time:.1f} us" for kernel, time in times.most_common())
            lines.append(f"{name}: kernels of a step, {kind}: {', '.join(kernels)}")
    return "\n".join(lines)


# --- The benchmark ----------------------------------------------------------------------------

# Flash's attention; of everything else less, so that it fits one GPU.
FLASH = Config(compress_ratios=(0, 4, 128), num_hash_layers=1, n_routed_experts=8, vocab_size=16384)

TINY = Config(
    compress_ratios=(4, 128),
    num_hash_layers=1,
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=32,
    num_attention_heads=4,
    head_dim=128,
    q_lora_rank=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    hc_mult=2,
    sliding_window=32,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=16,
    index_topk=16,
)


def make_step(engine: Engine, lengths: list[int], n: int) -> Batch:
    """A batch of requests that have ``lengths`` tokens and bring ``n`` more each."""
    rng, (group,) = np.random.default_rng(0), engine.groups
    options, parts = engine.options, []
    decodes = n <= options.next_n
    for slot, length in enumerate(lengths):
        group.pages.hold(slot, length, n, decodes=decodes)
        tokens = rng.integers(engine.config.vocab_size, size=n).tolist()
        parts.append(Part(Request([], 0, 1, length), slot, tokens, 0))
    shape = (options.batch, n) if decodes else (options.buckets[-1],)
    return group.make_batch(parts, shape)


def bench() -> int:
    """Steps of Flash's attention shapes on a GPU, of the small model on a CPU; the exit status."""
    device = jax.devices()[0]
    print(f"device: {device.device_kind}, jax {jax.__version__}")
    if device.platform == "gpu":
        config, batches, max_len, chunk, dtype = FLASH, (16, 64), 4096, 2048, jnp.bfloat16
        params = make_random(config, max_len=max_len, dtype=dtype)
        formats = {"record_formats": ("fp8_ds_mla", "fp8_block128"), "state_format": "prefix"}
        print(
            "DeepSeek-V4-Flash's attention shapes, 3 layers (sliding, CSA, HCA), 8 experts, bf16;"
        )
        print("records fp8_ds_mla and fp8_block128, state prefix f32; up to 4,096 tokens a request")
    else:
        config = TINY
        params = make_random(config, max_len=512, dtype=jnp.float32)
        batches, max_len, chunk, dtype, formats = (2,), 512, 64, jnp.float32, {}
        print("a tiny model in f32, since there is no GPU: these times say little")
    print("a step runs many times in a row, with the compressors' calls and without them; in both")
    print("programs are the products before them; differences: median of 5 rounds (least to most)")
    rng = np.random.default_rng(0)
    for batch in batches:
        options = Options(batch=batch, max_len=max_len, chunk=chunk, dtype=dtype, **formats)
        engine = Engine(config, params, options)
        step = make_step(engine, rng.integers(max_len // 4, max_len - 1, size=batch).tolist(), 1)
        print(describe_costs(engine, f"decode, B = {batch}", step, beside_jnp=True), flush=True)
    options = Options(batch=1, max_len=max_len, chunk=chunk, dtype=dtype, **formats)
    engine = Engine(config, params, options)
    step = make_step(engine, [chunk], chunk)
    print(describe_costs(engine, f"a chunk of {chunk} after {chunk}", step, beside_jnp=True))
    return 0


# --- Profiles ---------------------------------------------------------------------------------


def write_trace(engine: Engine, folder: str | pathlib.Path) -> pathlib.Path:
    """A profile of a few steps, for ui.perfetto.dev; our calls have their own names in it."""
    max_len = engine.options.max_len
    new = min(8, max_len - 1)
    prompt = list(range(min(40, engine.config.vocab_size, max_len - new)))
    engine.generate([prompt, prompt[:7]], new)  # what is to be compiled, is
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        engine.generate([prompt, prompt[:7]], new)
    path = max(
        pathlib.Path(folder).rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime
    )
    name_calls(path, [program.as_text() for program in engine.programs.values()])
    return path


def name_calls(path: pathlib.Path, programs: list[str]) -> int:
    """Name custom calls in a profile by operation and layer; how many events there are.

    On a CPU a profile has the names of XLA's instructions only: ``paged_operation.3``.
    """
    names = {}
    for text in programs:
        module = re.match(r"HloModule ([^,\s]+)", text)
        for line in text.splitlines():
            if (found := CALL.match(line)) and module:
                instruction, operation, place = found.groups()
                layer = re.search(r"layer \d+", place)
                label = f"jax_dsv4.{operation}" + (f" ({layer[0]})" if layer else "")
                names[module[1], instruction] = label
    trace = json.loads(gzip.decompress(path.read_bytes()))
    count = 0
    for event in trace["traceEvents"]:
        own = event.get("args", {})
        if label := names.get((own.get("hlo_module"), own.get("hlo_op"))):
            event["name"], count = label, count + 1
    path.write_bytes(gzip.compress(json.dumps(trace).encode()))
    return count
