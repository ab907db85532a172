"""A GPU measured in a fixed time: tests, correctness, speed, eight bits, training, each part with its own limit.

    python -m benchmarks.gpu --out benchmarks/gpu --seconds 540
    python -m benchmarks.gpu --out benchmarks/gpu --seconds 100 --parts quick
    python -m benchmarks.gpu --device cpu --config small --dtype float32 --gen-length 64    (a rehearsal)

Parts that share a model share a process (`gpu_parts`). A part that fails, or is not done in its time, ends alone; one
that takes the process with it (a fault of the GPU is for good) costs a new process, which goes on behind it. Every
result is a line of results.jsonl as soon as it is known; log.txt holds what was said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name: seconds at most; in order of value
PARTS = {
    "machine": 12,
    "equal": 25,
    "dual": 30,
    "none": 15,
    "eager": 12,
    "batch": 25,
    "profile": 20,
    "pieces": 20,
    "c2f": 20,
    "grid": 90,
    "peers": 60,
    "eight_bits": 30,
    "training": 100,
}
QUICK = ("machine", "equal", "dual", "none", "eager", "batch", "profile", "pieces", "eight_bits")
TESTS = ("tests/kernels/test_triton.py", "tests/kernels/test_cuda_graphs.py", "tests/kernels/test_fp8.py")
TESTS_SECONDS = 48  # beside the first parts, which time nothing; all is timed after them


class Log:
    """Lines to the screen and to a file, with the seconds since the start."""

    def __init__(self, path: Path):
        self.began, self.file, self.lock = time.monotonic(), path.open("a"), threading.Lock()

    def __call__(self, line: str) -> None:
        with self.lock:
            text = f"{time.monotonic() - self.began:6.1f} {line.rstrip()}"
            print(text, flush=True)
            print(text, file=self.file, flush=True)


class Child:
    """A process in a group of its own, whose output goes to the log line by line."""

    def __init__(self, command: Sequence[str], log: Log, name: str, **more):
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True, **more,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(log, name), daemon=True)
        self.reader.start()

    def _read(self, log: Log, name: str) -> None:
        for line in self.process.stdout:
            log(f"{name}: {line}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, until: float) -> int | None:
        """The exit status, None where it was stopped for being late."""
        try:
            code = self.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            self.stop()
        self.reader.join(1)
        return code


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, default=Path("benchmarks/gpu"), metavar="FOLDER")
    add("--seconds", type=float, default=540, metavar="N", help="for all (default: 540)")
    add("--parts", nargs="+", default=["all"], metavar="NAME", help=f"all, quick, or of {', '.join(PARTS)}")
    add("--without-tests", action="store_true", help="leave out the tests, which run beside the first parts")
    add("--device", default="cuda")
    add("--config", default="llada-8b", metavar="NAME", help="the shape, with random weights (default: llada-8b)")
    add("--dtype", default="bfloat16")
    add("--gen-length", type=int, default=512, metavar="N")
    add("--train-config", default="llada-1b", metavar="NAME", help="the shape of the training part")
    add("--fast-dllm", metavar="PATH", help="a clone of Fast-dLLM, for the part peers")
    return parser


def names_of(words: Sequence[str]) -> list[str]:
    """The parts in their order. Raises ValueError for a word that is none."""
    known = {"all": list(PARTS), "quick": list(QUICK)}
    for word in words:
        if word not in known and word not in PARTS:
            raise ValueError(f"part {word!r} is none of all, quick, {', '.join(PARTS)}")
    wanted = {name for word in words for name in known.get(word, [word])}
    return [name for name in PARTS if name in wanted]


def reached(results: Path) -> list[str]:
    """The parts that were begun, as results.jsonl says."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [line["part"] for line in lines if line.get("state") == "begun"]


def main(argv: Sequence[str] | None = None) -> int:
    args = options().parse_args(argv)
    try:
        left = names_of(args.parts)
    except ValueError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results, tests_done = out / "results.jsonl", out / ".tests_done"
    for path in (results, tests_done):
        path.unlink(missing_ok=True)
    log = Log(out / "log.txt")
    until = log.began + args.seconds - 1
    tests = None
    if args.without_tests:
        tests_done.touch()
    else:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS]
        try:
            import xdist  # noqa: F401

            command += ["-n", str(min(10, os.cpu_count() or 1)), "--dist", "worksteal"]
        except ImportError:
            pass
        tests = Child(command, log, "tests")

        def watch_tests() -> None:
            code = tests.wait(min(until, log.began + TESTS_SECONDS))
            log(f"tests: exit status {code if code is not None else 'none, stopped at their time'}")
            tests_done.touch()

        threading.Thread(target=watch_tests, daemon=True).start()
    more = ["--fast-dllm", args.fast_dllm] if args.fast_dllm else []
    while left and time.monotonic() < until - 5:
        before = len(reached(results))
        command = [
            sys.executable, "-m", "benchmarks.gpu_parts", "--out", str(out), "--device", args.device,
            "--config", args.config, "--dtype", args.dtype, "--gen-length", str(args.gen_length),
            "--train-config", args.train_config, "--until", str(until - time.monotonic() + time.time()),
            *more, "--parts", *(f"{name}:{PARTS[name]}" for name in left),
        ]  # fmt: skip
        code = Child(command, log, "parts").wait(until)
        begun = reached(results)[before:]
        left = [name for name in left if name not in begun]
        if code == 0 or code is None:
            break
        log(f"the process ended with status {code} in part {begun[-1] if begun else 'none'}")
        if not begun:  # it does not even start
            break
        more = [*more, "--torch-kernels"]  # the kernels that are suspected first are our own
    if tests is not None:
        tests.wait(min(until, log.began + TESTS_SECONDS))
    tests_done.unlink(missing_ok=True)
    log(f"left out: {', '.join(left)}" if left else "all parts were begun")
    return 0


if __name__ == "__main__":
    sys.exit(main())
