"""Results of a function that are kept for the next call with the same arguments, within so many bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

__all__ = ["kept"]

T = TypeVar("T")


def kept(limit: int, size: Callable[[T], int]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator: results are kept until all of them take more than `limit` bytes; the longest unused go first.

    size: bytes of a result. One above the limit is not kept. Arguments are hashable; errors are not kept. Threads may
    call it at once; two that ask for the same at once both make it.
    """

    def decorated(make: Callable[..., T]) -> Callable[..., T]:
        results: OrderedDict[tuple, tuple[T, int]] = OrderedDict()
        lock, held = threading.Lock(), 0

        @wraps(make)
        def call(*args) -> T:
            nonlocal held
            with lock:
                if args in results:
                    results.move_to_end(args)
                    return results[args][0]
            made = make(*args)
            taken = size(made)
            with lock:
                if args not in results and taken <= limit:
                    results[args], held = (made, taken), held + taken
                    while held > limit:
                        held -= results.popitem(last=False)[1][1]
            return made

        return call

    return decorated
