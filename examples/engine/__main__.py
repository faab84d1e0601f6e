"""Serve a DeepSeek-V4 from the command line; see ``--help`` and README.md."""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from examples.engine import golden, measure
from examples.engine.server import Engine, Options, Request, look_up, name_step
from examples.engine.weights import load_checkpoint, load_tiny
from jax_dsv4 import RECORD_FORMATS, STATE_FORMATS
from jax_dsv4.demo.cli import OptionError, at_least, run_command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.engine",
        description="Serve a whole DeepSeek-V4 whose compressors are calls of jax_dsv4.",
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FOLDER", help="config.json and *.safetensors; default: tiny.npz")
    add("--prompts", metavar="FILE", type=pathlib.Path, help="token ids, a prompt per line")
    add("--requests", type=at_least(0), default=12, help="how many prompts to make without a file")
    add("--prompt-tokens", type=at_least(1), default=200, help="the most of a prompt that is made")
    add("--max-tokens", type=at_least(1), default=64, help="new tokens per request")
    add("--max-len", type=at_least(2), default=512, help="tokens of the longest request")
    add("--batch", type=at_least(1), default=4, help="requests that run at a time, per device")
    add("--chunk", type=at_least(1), default=128, help="rows of prompts per step, per device")
    add(
        "--drafts",
        type=at_least(0),
        default=0,
        help="drafts per request and step, by prompt lookup",
    )
    add("--groups", type=at_least(1), help="devices that serve with the same weights")
    add("--state-format", choices=STATE_FORMATS, default="raw")
    add("--records", choices=RECORD_FORMATS, nargs=2, default=("f32", "f32"),
        metavar=("MAIN", "INDEXER"), help="formats of the records")  # fmt: skip
    add("--implementation", choices=("ffi", "xla"), help="of the compressors; default: compiled")
    add("--seed", type=at_least(0), default=0)
    add("--quiet", action="store_true", help="print no tokens")
    add(
        "--trace",
        metavar="FOLDER",
        type=new_folder,
        help="write a profile of a few steps, for ui.perfetto.dev",
    )
    add("--check", action="store_true", help="compare with the golden run, and exit")
    add("--bench", action="store_true", help="time steps of Flash's attention shapes, and exit")
    options = parser.parse_args(arguments)
    if options.max_len <= options.max_tokens:
        parser.error(
            f"argument --max-len: expected more than --max-tokens = {options.max_tokens}, "
            f"got {options.max_len}"
        )
    return options


def new_folder(text: str) -> pathlib.Path:
    """An argparse type: a folder that is made if it is not there, before the run."""
    path = pathlib.Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def read_prompts(options: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Those of the file; or some, of which every second one begins with the same 128 tokens.

    Raises:
      OSError, ValueError: the file cannot be read, or has something else than integers.
    """
    if options.prompts:
        lines = options.prompts.read_text().splitlines()
        return [[int(token) for token in line.split()] for line in lines if line.strip()]
    rng = np.random.default_rng(options.seed)
    lengths = rng.integers(1, options.prompt_tokens + 1, size=options.requests)
    common = rng.integers(vocab, size=128).tolist()
    prompts = [rng.integers(vocab, size=length).tolist() for length in lengths]
    longest = options.max_len - options.max_tokens
    return [(common * (i % 2) + prompt)[:longest] for i, prompt in enumerate(prompts)]


def check() -> int:
    """Compare with the golden run; the exit status."""
    start, right = time.perf_counter(), True
    for text, is_right in golden.check():
        print(f"{'ok' if is_right else 'WRONG'}: {text}", flush=True)
        right = right and is_right
    print(f"{time.perf_counter() - start:.1f} s")
    return 0 if right else 1


def make_engine(options: argparse.Namespace) -> Engine:
    """An engine with the checkpoint's weights, or the tiny model's."""
    if options.checkpoint:
        config, params = load_checkpoint(options.checkpoint, max_len=options.max_len)
    else:
        config, params = load_tiny(max_len=options.max_len)
    names = ("batch", "max_len", "chunk", "drafts", "state_format", "implementation")
    own = {name: getattr(options, name) for name in names}
    own["dtype"] = params["embed_tokens.weight"].dtype
    return Engine(
        config,
        params,
        Options(**own, record_formats=tuple(options.records)),
        draft=functools.partial(look_up, ngram=2),
        groups=options.groups,
    )


def serve(options: argparse.Namespace) -> int:
    """Read or make prompts, and stream what follows; the exit status."""
    try:
        engine = make_engine(options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise OptionError(error) from error
    requests: list[Request] = []
    try:
        for prompt in read_prompts(options, engine.config.vocab_size):
            requests.append(engine.submit(prompt, options.max_tokens))
    except (OSError, ValueError) as error:
        where = f"--prompts {options.prompts}, after {len(requests)} prompts: "
        raise OptionError(f"{where if options.prompts else ''}{error}") from error
    start = time.perf_counter()
    engine.warm_up()
    seconds, device = time.perf_counter() - start, jax.devices()[0].device_kind
    print(f"compiled {len(engine.programs)} steps in {seconds:.1f} s on {device}")
    for request in requests:
        request.arrival = time.perf_counter()  # they wait from now on, not for the compiler
    index = {request: i for i, request in enumerate(requests)}
    with tqdm(total=options.max_tokens * len(requests), unit="token", disable=None) as bar:
        for new in engine.run():
            bar.update(sum(map(len, new.values())))
            for request, tokens in new.items():
                if not options.quiet:
                    bar.write(f"{index[request]}: {' '.join(map(str, tokens))}")
    for request in requests:
        if request.status != "finished":
            print(f"{index[request]}: {request.status}: {request.error}")
    report(engine, requests)
    if options.trace:
        print("profile:", measure.write_trace(engine, options.trace))
    return 0 if all(request.status == "finished" for request in requests) else 1


def report(engine: Engine, requests: Sequence[Request]) -> None:
    """Print what was measured."""
    stats = engine.stats
    print(f"{stats.steps} steps")
    for name, tokens, seconds in (
        ("prefill", stats.prompt_tokens, stats.prompt_seconds),
        ("decode", stats.decode_tokens, stats.decode_seconds),
    ):
        rate = f"{tokens / seconds:.0f} tokens/s" if seconds else "no steps"
        print(f"{name}: {rate} ({tokens} tokens in {seconds:.2f} s)")
    waits = [r.first_token - r.arrival for r in requests if r.first_token]
    if waits:
        print(
            f"time to first token: median {statistics.median(waits):.3f} s, max {max(waits):.3f} s"
        )
    print(f"drafts: {stats.accepted} of {stats.drafts} accepted")
    print(f"prompt tokens of cached prefixes: {sum(r.reused for r in requests)}")
    for batch in engine.examples.values():
        print(measure.describe_costs(engine, name_step(batch), batch))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    options = parse(arguments)
    if options.check or not (options.bench or options.checkpoint):
        jax.config.update("jax_default_matmul_precision", "highest")  # f32 that is f32 on a GPU
    if options.check:
        return run_command(check)
    if options.bench:
        return run_command(measure.bench)
    return run_command(lambda: serve(options))


if __name__ == "__main__":
    sys.exit(main())
