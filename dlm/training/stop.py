"""How a run is stopped: politely by a signal, at once by a second one, and with the ranks that it cannot do without."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from dlm.utils.peers import Peers, first_to_say

GRACE_SECONDS = 1.0  # for the main thread to end by itself before the process is ended from outside of it
WATCH_SECONDS = 1.0


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once.

    Python runs a handler between two operations, and one operation of a large step may take minutes. So a thread reads
    the signals as they come: it answers the first within a moment, and ends the process on the second where the main
    thread does not. speaks: whether this process says so (the first of several does). peers: the other processes of
    the job; where one of them is gone, this one ends too.
    """

    def __init__(self, speaks: bool = True, peers: Peers | None = None):
        self.speaks, self.peers = speaks, peers
        self.requested, self.name = False, ""
        self._ended = threading.Event()

    def __enter__(self) -> StopSignal:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
            threading.Thread(target=self._listen, daemon=True).start()
        if self.peers:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # the thread reads the end and closes its own

    def _note(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name

    def _listen(self) -> None:
        """Read the numbers of the signals that come (in a thread)."""
        heard = 0
        while numbers := os.read(self._reader, 1):
            if numbers[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            heard += 1
            name = signal.Signals(numbers[0]).name
            if heard == 1 and self.peers and self.peers.gone():
                continue  # the launcher ends what is left of the job, whose end another process says
            if heard == 1:
                self._say(f"{name}: this step is finished and a checkpoint written; a second one stops at once")
            elif not self._ended.wait(GRACE_SECONDS):
                self._say(f"{name} again: stopped in the middle of a step")
                os._exit(128 + numbers[0])
        os.close(self._reader)

    def _watch(self) -> None:
        """End this process where another one of the job is gone (in a thread): it may wait for that one for ever."""
        while not self._ended.wait(WATCH_SECONDS):
            gone = self.peers.gone()
            if gone and not self._ended.wait(GRACE_SECONDS):
                if first_to_say():
                    print(self.peers.line(gone), file=sys.stderr, flush=True)
                time.sleep(0.1)
                os._exit(1)

    def _say(self, line: str) -> None:
        if self.speaks:
            sys.stderr.write(f"\n{line}\n" if sys.stderr.isatty() else f"{line}\n")
            sys.stderr.flush()
