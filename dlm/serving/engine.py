"""The engine: one thread owns the model, and requests are rows that join and leave its batch between passes.

Shapes: B rows of the batch, T slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from dlm.sampling.denoise import turn
from dlm.sampling.methods import METHODS
from dlm.sampling.rows import Batch, Row
from dlm.serving.prefixes import Prefixes
from dlm.serving.ranks import BEAT_SECONDS, Lead, RanksLost, new_batch
from dlm.serving.requests import Closing, Handle, PassFailed, QueueFull, Request, RowFailed
from dlm.serving.running import Running
from dlm.serving.stats import Stats
from dlm.serving.waiting import Waiting, prepared
from dlm.utils.errors import one_line

if TYPE_CHECKING:
    from dlm.checkpoints.pretrained import Pretrained

__all__ = ["Engine", "EngineSettings"]

log = logging.getLogger("dlm.serving")


@dataclass(frozen=True)
class EngineSettings:
    """max_rows: rows of the model's batch (guidance takes two). max_waiting: requests that may wait. max_slots: of one
    request, None for the model's own limit. kv_bytes: of memory for keys and values. prefix_bytes: of that
    kind for blocks of prompts that may come again, 0 for none. timeout: seconds that a request may take, waiting
    included; None for no limit."""

    max_rows: int = 16
    max_waiting: int = 64
    max_slots: int | None = None
    kv_bytes: int = 2**30
    prefix_bytes: int = 2**26
    timeout: float | None = 600.0

    def __post_init__(self):
        for name, least in (("max_rows", 1), ("max_waiting", 0), ("kv_bytes", 1), ("prefix_bytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.max_slots is not None and self.max_slots < 1:
            raise ValueError(f"max_slots is {self.max_slots}: give 1 or more")
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}: give seconds, above 0")


class Engine:
    """Denoises requests together with an open checkpoint, whose weights are read in the engine's own thread.

    state: `loading`, `ready`, `draining` (what is there is finished, nothing new is taken), `closed` or `failed` (then
    `failure` says why).
    """

    def __init__(self, pretrained: Pretrained, settings: EngineSettings | None = None, lead: Lead | None = None):
        """lead: tells the other processes of a model whose layers are shared out. Raises ValueError for a checkpoint
        that cannot fill in masks, or has no tokenizer."""
        pretrained.check_diffusion()
        pretrained.check_tokenizer()
        self.pretrained, self.settings, self.stats = pretrained, settings or EngineSettings(), Stats()
        self.state, self.failure = "loading", None
        self.loaded, self.ended = threading.Event(), threading.Event()
        self.text_lock = threading.RLock()  # a tokenizer is not to be changed and read at once
        self._pieces: dict[int, str] = {}
        self._ready_to_work = threading.Condition()
        self._waiting: deque[Waiting] = deque()
        self._running: list[Running] = []
        self._batch: Batch | None = None
        self.prefixes = Prefixes(self.settings.prefix_bytes)
        self._abandon, self._lead = False, lead
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="dlm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the callers' side

    def submit(self, request: Request) -> Handle:
        """Puts a request into the queue, from any thread.

        Raises ValueError for one that fits neither the model nor the limits, QueueFull, Closing.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Puts all of the requests into the queue, or none of them. Raises as `submit`."""
        self.check_count(len(requests))
        ready = [prepared(self, request) for request in requests]
        with self._ready_to_work:
            if self.state in ("draining", "closed", "failed"):
                raise Closing(self.failure or "the server is shutting down: send the request to another one")
            free = max(0, self.settings.max_rows - len(self._running)) if self.state == "ready" else 0
            if len(self._waiting) + len(ready) > self.settings.max_waiting + free:
                self.stats.refused += len(ready)
                raise QueueFull(f"{len(self._waiting)} requests are waiting: try again later")
            self._waiting.extend(ready)
            self._ready_to_work.notify()
        return [item.handle for item in ready]

    def check_count(self, count: int) -> None:
        """Raises ValueError for more texts at once than may run and wait."""
        if count > (most := self.settings.max_waiting + self.settings.max_rows):
            raise ValueError(f"{count} texts were asked for at once, and the server takes {most}: ask for fewer")

    def wait_until_loaded(self, timeout: float | None = None) -> None:
        """Returns once the weights are there. Raises what went wrong with them, TimeoutError."""
        if not self.loaded.wait(timeout):
            raise TimeoutError(f"the model was not loaded within {timeout} s")
        if self.failure is not None:
            raise ValueError(self.failure)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, finishes those that are there, and ends the thread; False where `timeout` seconds
        did not suffice."""
        with self._ready_to_work:
            if self.state in ("loading", "ready"):
                self.state = "draining"
            self._ready_to_work.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread at the next pass; requests that are not done end with Closing."""
        with self._ready_to_work:  # nothing joins the queue after the thread has emptied it for the last time
            self._abandon = True
            if self.state in ("loading", "ready"):
                self.state = "draining"
        self.drain()

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end a text, whatever a request says."""
        from dlm.tokenizer import EOT

        tokenizer = self.pretrained.tokenizer
        ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get(EOT), *self.pretrained.end_ids}
        return frozenset(ids - {None})

    @property
    def slot_bytes(self) -> int:
        """Bytes of keys and values that a slot of a row takes."""
        config = self.pretrained.config
        size = getattr(getattr(self.pretrained.predictor, "embedding", None), "itemsize", 4)
        return 2 * config.layers_applied * config.n_kv_heads * config.head_dim * size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens removed."""
        with self.text_lock:
            return self.pretrained.text(ids)

    def piece(self, token: int) -> str:
        """The text of one id, "" of a special one."""
        if token not in self._pieces:
            self._pieces[token] = self.decode([token])
        return self._pieces[token]

    def name_of(self, token: int) -> str:
        """The text of one id, the name of a special one."""
        if not self.piece(token):
            with self.text_lock:
                return self.pretrained.tokenizer.decode([token])
        return self.piece(token)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # a setting of the thread, not of the process
        try:
            self.pretrained.ready()
        except Exception as error:
            self.failure, self.state = one_line(error), "failed"
            self._end_all(Closing(self.failure))
            self.loaded.set()
            return
        with self._ready_to_work:
            if self.state == "loading":
                self.state = "ready"
        self.loaded.set()
        try:
            while self._work_came():
                self._one_turn()
            self._end_all(Closing("the server is shutting down: send the request to another one"))
            self.state = "closed"
            if self._lead is not None:
                self._lead.tell(stop=True)
        except Exception as error:  # of other processes, or of the engine itself: nobody is left to wait for it
            if not isinstance(error, RanksLost):
                log.exception("the engine failed")
            self.failure, self.state = one_line(error), "failed"
            self._end_all(Closing(self.failure))
        finally:
            self.ended.set()

    def _work_came(self) -> bool:
        """Waits for something to do; False where all is done, or is to be left."""
        while not self._abandon:
            with self._ready_to_work:
                if self._waiting or self._running:
                    return True
                if self.state == "draining":
                    return False
                came = self._ready_to_work.wait(None if self._lead is None else BEAT_SECONDS)
            if not came:
                self._lead.tell()
        return False

    def _one_turn(self) -> None:
        try:
            self._drop_unwanted()
            self._admit()
            if self._running:
                self._one_pass()
        except Exception as error:  # of one pass: its rows are lost, the server is not
            if self._lead is not None:
                raise RanksLost.of(error) from error
            log.exception("a pass failed")
            self._lose_rows(PassFailed(f"the pass failed: {one_line(error)}"))

    def _drop_unwanted(self) -> None:
        """Lets those go whose client has gone or whose time is over."""
        now = time.monotonic()
        with self._ready_to_work:
            for item in [item for item in self._waiting if item.handle.unwanted(now)]:
                self._waiting.remove(item)
                self._finish(item.handle, error=item.handle.unwanted(now))
        for running in [running for running in self._running if running.handle.unwanted(now)]:
            self._leave(running)
            self._finish(running.handle, error=running.handle.unwanted(now))

    def _admit(self) -> None:
        """Rows for the requests that wait, first come first served, as long as there is room."""
        while True:
            with self._ready_to_work:
                if not self._waiting or not self._fits(self._waiting[0]):
                    return
                item = self._waiting.popleft()
            began = time.monotonic()
            try:
                self._join(item)
            except ValueError as error:  # settings that do not fit the model, or no text that matches fits
                self._finish(item.handle, error=error)
            except Exception as error:  # it is in the queue no more, and in no batch
                self._finish(item.handle, error=RowFailed(f"the request could not begin: {one_line(error)}"))
                if self._lead is not None:
                    raise
                log.exception("a row could not join")
            self.stats.joining += time.monotonic() - began

    def _fits(self, item: Waiting) -> bool:
        """Whether the row may join now: rows, and memory for the keys and values of all of them."""
        config = item.handle.request.config
        branches = 2 if config.cfg_scale else 1
        if not self._running:
            return True  # alone; what is too large even then, `_join` refuses
        if sum(running.row.branches for running in self._running) + branches > self.settings.max_rows:
            return False
        rows = [running.row for running in self._running]
        cached = METHODS[config.method].cached
        slots = max([item.canvas.tokens.shape[1], *(row.length for row in rows), self._batch.canvas.tokens.shape[1]])
        widest = max([branches, *(row.branches for row in rows)])
        count = max(len(self._batch.rows), len(rows) + 1)
        if not cached and not any(row.method.cached for row in rows):
            return True
        return count * widest * slots * self.slot_bytes <= self.settings.kv_bytes

    def _join(self, item: Waiting) -> None:
        request, now = item.handle.request, time.monotonic()
        branches = 2 if request.config.cfg_scale else 1
        need = len(request.ids) * branches * self.slot_bytes
        if METHODS[request.config.method].cached and need > self.settings.kv_bytes:
            raise ValueError(
                f"keys and values of {len(request.ids)} tokens take {need / 1e6:.0f} MB, and the server has "
                f"{self.settings.kv_bytes / 1e6:.0f} MB: shorten the prompt or max_tokens"
            )
        if self._batch is None:
            self._batch = self._new_batch()
        canvas = item.canvas.to(self.pretrained.device)
        [row] = self._batch.join(canvas, request.config, item.constraints)
        if self._lead is not None:
            self._lead.joined(request.ids, request.config)
        if row.done:
            self._free(row)
            raise ValueError("the canvas has no masked place: there is nothing to write")
        self._running.append(Running(self, item.handle, row, now - item.handle.began))

    def _new_batch(self) -> Batch:
        return new_batch(self.pretrained)

    def _one_pass(self) -> None:
        batch, before = self._batch, time.monotonic()
        batch.likely = max((running.handle.request.likely or 0 for running in self._running), default=0)
        count = len(self._running)
        new = [running.row for running in self._running if running.row.nfe == 0]
        if self._lead is not None:
            self._lead.tell(batch.likely)
        batch.make_room()
        for row in new:
            self.prefixes.lend(batch, row)
        with self.stats.model_time(batch):
            state = turn(batch)
        for row in new:
            if row.fault is None:
                self.prefixes.keep(batch, row)
        written = state.committed.sum(dim=1).tolist()
        tokens = state.canvas.tokens.tolist()
        for running in list(self._running):
            row = running.row
            if row.fault is not None:
                self._leave(running)
                self._finish(running.handle, error=RowFailed(row.fault))
                continue
            result = error = None
            try:
                running.follow(state, tokens[row.index], written[row.index])
                if row.done or running.ended:
                    result = running.result(state, tokens[row.index])
            except Exception as wrong:  # of this text alone, such as one that cannot be decoded
                log.exception("a text failed")
                error = RowFailed(f"the text cannot be told: {one_line(wrong)}")
            if result is not None or error is not None:
                self._leave(running)
                self._finish(running.handle, result, error)
        self.stats.passed(count, sum(written), time.monotonic() - before)

    def _leave(self, running: Running) -> None:
        self._running.remove(running)
        self._free(running.row)

    def _free(self, row: Row) -> None:
        """Takes a row out of the batch, and with the last one what the largest requests took."""
        self._batch.leave(row)
        if self._lead is not None:
            self._lead.left(row.index)
        if not any(self._batch.rows):
            self._batch.close()
            self._batch = None

    def _finish(self, handle: Handle, result=None, error: Exception | None = None) -> None:
        self.stats.finished(handle, result, error)
        handle.finish(result, error)

    def _lose_rows(self, error: Exception) -> None:
        """Ends the rows of a batch in which something went wrong."""
        for running in self._running:
            self._finish(running.handle, error=error)
        self._running, self._batch = [], None

    def _end_all(self, error: Exception) -> None:
        self._lose_rows(error)
        with self._ready_to_work:
            for item in self._waiting:
                self._finish(item.handle, error=error)
            self._waiting.clear()

    # ------------------------------------------------------------ what it does now

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def kv_used(self) -> int:
        """Bytes of keys and values in memory."""
        batch = self._batch
        return 0 if batch is None or batch.cache is None else batch.cache.rows * batch.cache.length * self.slot_bytes
