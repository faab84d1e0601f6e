"""Runs the fuzzes of the kernels, of ``decode_records`` and of ragged batches, on a CPU.

    python tests/emulator/run.py [records|ragged] [cases] [seed=0]

Needs a C++ compiler (CXX, or c++) and no CUDA. Compiles copies of tests/fuzz_records.cu and
tests/fuzz_ragged.cu in which calls of emulator.h stand for what is not C++; that file says how
threads run and what fails. A case draws a device with clusters or without: ``run.py ragged 1 SEED``
runs the case of a failure alone.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=c++17 -O1 -ffp-contract=off -fno-strict-aliasing -pthread -Wno-unknown-pragmas"
# Values that were never set are the same in every run; longjmp may go to another stack.
FLAGS += " -ftrivial-auto-var-init=pattern -U_FORTIFY_SOURCE"

CASES = {"records": "800", "ragged": "300"}  # of each fuzz
# What of ffi/ is compiled with it.
KERNELS = {
    "records": ("decode_records_launch.cu",),
    "ragged": ("ragged_launch.cu", "ragged_records_launch.cu"),
}

START = (r"(run\(uint64_t seed\) \{)", r"\1 emulator::start_case(seed);")
SHARED = (
    r"__shared__ (typename \w+::SharedPlan|union \{[^{}]*\}) smem;",
    r"using Shared = \1; auto& smem = emulator::shared<Shared>();",
)
# In a file, what of it stands in place of what, and how often.
SUBSTITUTIONS = [
    ("decode_raw.cuh", *SHARED, 1),
    ("decode_prefix.cuh", *SHARED, 1),
    ("decode_records.cuh", *SHARED, 2),
    ("ragged.cuh", *SHARED, 2),
    ("record_maker.cuh", r'asm volatile\("" : "\+r"\(s.flags\), "\+f"\(s.eps\)\);', "", 1),
    ("record_stage.cuh", r'asm\("rsqrt.*"\(x\)\);', "y = 1 / sqrtf(x);", 1),
    *((f"fuzz_{fuzz}.cu", *START, 1) for fuzz in CASES),
]

# By function of vector.cuh: its body, or what comes before it, where that ends in "...". `at` is
# the place of the call.
BODIES = {
    "load": "emulator::access(source, alignof(Vector<Element, kSize>), at); ...",
    "store": "emulator::access(target, alignof(Vector<Element, kSize>), at); ...",
    "load_once": "return load<Element, kSize>(source, at);",
    "load_if": """if (!condition) return otherwise;
        emulator::access(from, alignof(decltype(otherwise)), at);
        return *reinterpret_cast<const decltype(otherwise)*>(from);""",
    "load_once_if": "return load_if(condition, from, otherwise, at);",
    "look_up_if": "...",
    "prefetch_l1": "",
    "prefetch_l2_if": "",
    "copy_if": "if (condition) emulator::copy(to, from, kSize * sizeof(Element), at);",
    "commit_copies": "++emulator::current->num_groups;",
    "wait_for_copies": "emulator::wait_for_copies(kPending);",
    "opaque": "return pointer;",
    "keep_in_registers": "",
    "wait_at_barrier": "emulator::meet_cta(barrier, kThreads, true, at);",
    "arrive_at_barrier": "emulator::meet_cta(barrier, kThreads, false, at);",
    "shared_address": "return 0;",
    "rank_in_cluster": "return emulator::current->cta->rank;",
    "arrive_at_cluster": "emulator::arrive_at_cluster(at);",
    "wait_for_cluster": "emulator::wait_for_cluster(at);",
    "expect_bytes": "emulator::expect_bytes(barrier, bytes, at);",
    "wait_for_bytes": "emulator::wait_for_bytes(barrier, at);",
    "send": "emulator::send(to, x, barrier, rank, at);",
}
FUNCTION = re.compile(r"(__device__ [^;{}]*?(\w+)\(([^)]*))\) \{\n(.*?\n)\}\n", re.DOTALL)


def substitute_function(match):
    head, name, parameters, body = match.groups()
    new = BODIES[name].replace("...", body)
    return f"{head}{', ' if parameters else ''}emulator::Place at = {{}}) {{\n{new}\n}}\n"


def copy_sources(folder):
    for source in [*(ROOT / "ffi").glob("*.*"), *(ROOT / "tests").glob("fuzz*.cu*")]:
        text = source.read_text()
        for name, old, new, expected in SUBSTITUTIONS:
            if name == source.name:
                text, count = re.subn(old, new, text)
                assert count == expected, f"{source}: {count} times, not {expected}: {old}"
        if source.name == "vector.cuh":
            assert {match[2] for match in FUNCTION.finditer(text)} == set(BODIES), source
            text = FUNCTION.sub(substitute_function, text)
        (folder / source.name).write_text(text)
    for name in ("cuda_runtime.h", "cuda_bf16.h"):
        (folder / name).touch()


def main():
    arguments = sys.argv[1:]
    fuzzes = [arguments.pop(0)] if arguments and arguments[0] in CASES else list(CASES)
    with tempfile.TemporaryDirectory() as name:
        folder, emulator = Path(name), Path(__file__).with_name("emulator.h")
        copy_sources(folder)
        build = [os.environ.get("CXX", "c++"), *FLAGS.split(), f"-I{name}", "-include", emulator]
        build += ["-x", "c++"]

        def run(fuzz):
            program = folder / fuzz
            sources = [folder / source for source in (f"fuzz_{fuzz}.cu", *KERNELS[fuzz])]
            subprocess.run([*build, *sources, "-o", program], check=True)
            return subprocess.run([program, *(arguments or [CASES[fuzz]])], capture_output=True)

        with ThreadPoolExecutor() as pool:
            results = list(pool.map(run, fuzzes))
    for fuzz, result in zip(fuzzes, results, strict=True):
        print(f"{fuzz}:\n{result.stdout.decode()}{result.stderr.decode()}", end="")
    sys.exit(any(result.returncode != 0 for result in results))


if __name__ == "__main__":
    main()
