"""A process of its own that turns patterns into automata: no pattern takes the caller's time or memory beyond a bound.

The automaton of `(a|b)*a(a|b){30}` has 2^31 states, and nothing about the text of a pattern says so. The same file is
the program of the process, which needs outlines-core alone.

Pipes carry messages: four bytes of length, then that many bytes. A request is a pattern in UTF-8. A reply begins with
one byte: 0, then 32-bit numbers (the first state, how many states accept, those, and a state, a byte and the next state
for every edge); or 1 and an error in UTF-8.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import struct
import subprocess
import sys
import threading
from array import array
from pathlib import Path

__all__ = ["MEMORY", "MOST_STATES", "SECONDS", "TooLarge", "automaton_of"]

SECONDS = 30.0  # that a pattern may take
MEMORY = 2**31  # bytes of the process, where the system can hold it to them
MOST_STATES = 20_000


class TooLarge(ValueError):
    """The automaton takes more time, memory or states than it may."""


def automaton_of(pattern: str) -> tuple[int, list[int], array]:
    """The first state, the accepting ones, and (state, byte, next state) of all edges in one array.

    Raises ValueError with outlines-core's words, TooLarge.
    """
    return _WORKER.ask(pattern)


class _Worker:
    """The process, begun at the first pattern and again after one that was too large."""

    def __init__(self):
        self.process, self.owner, self.lock = None, 0, threading.Lock()

    def ask(self, pattern: str) -> tuple[int, list[int], array]:
        request = pattern.encode()
        with self.lock:
            process = self._running()
            late = threading.Timer(SECONDS, process.kill)
            late.start()
            try:
                process.stdin.write(struct.pack("<I", len(request)) + request)
                process.stdin.flush()
                reply = _message(process.stdout)
            except OSError:  # it has ended
                reply = None
            finally:
                late.cancel()
            if reply is None:
                self.close()
                raise TooLarge(f"its automaton takes more than {SECONDS:g} s or {MEMORY / 2**30:g} GB")
        if reply[0]:
            text = reply[1:].decode()
            raise (TooLarge if text.startswith("its automaton") else ValueError)(text)
        numbers = array("I")
        numbers.frombytes(reply[1:])
        first, count = numbers[0], numbers[1]
        return first, list(numbers[2 : 2 + count]), numbers[2 + count :]

    def _running(self) -> subprocess.Popen:
        if self.owner != os.getpid():  # the process of a parent that was forked
            self.process = None
        if self.process is None or self.process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            command = [sys.executable, "-P", "-c", Path(__file__).read_text(encoding="utf-8")]
            self.process, self.owner = subprocess.Popen(command, **pipes), os.getpid()
        return self.process

    def close(self) -> None:
        """Ends the process."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was written to a process that has ended
                    pipe.close()


def _message(pipe) -> bytes | None:
    """The next message, None where the pipe ends."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack("<I", head)[0]
    body = pipe.read(size)
    return body if len(body) == size else None


def _serve() -> None:
    """The process: answers until its input ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, OSError, ValueError):  # this system has no such limit
        pass
    from outlines_core import Index, Vocabulary

    every = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    while (request := _message(sys.stdin.buffer)) is not None:
        try:
            index = Index(request.decode(), every)
            found = index.get_transitions()
            if len(found) > MOST_STATES:
                raise ValueError(f"its automaton has {len(found):,} states, and {MOST_STATES:,} is the most")
            final = list(index.get_final_states())
            numbers = array("I", [index.get_initial_state(), len(final), *final])
            for state, steps in found.items():
                for byte, target in steps.items():
                    numbers.extend((state, byte, target))
            reply = b"\0" + numbers.tobytes()
        except Exception as error:
            reply = b"\1" + (str(error) or type(error).__name__).encode()
        sys.stdout.buffer.write(struct.pack("<I", len(reply)) + reply)
        sys.stdout.buffer.flush()


_WORKER = _Worker()
atexit.register(_WORKER.close)

if __name__ == "__main__":
    _serve()
