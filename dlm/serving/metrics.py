"""The engine's counters in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlm.serving.stats import Histogram

if TYPE_CHECKING:
    from dlm.serving.engine import Engine

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(engine: Engine) -> str:
    """All that is measured, as Prometheus reads it."""
    stats, lines = engine.stats, []

    def metric(name: str, kind: str, text: str, *values: tuple[str, float]) -> None:
        lines.extend([f"# HELP dlm_{name} {text}", f"# TYPE dlm_{name} {kind}"])
        lines.extend(f"dlm_{name}{labels} {value:g}" for labels, value in values)

    def histogram(name: str, text: str, values: Histogram) -> None:
        lines.extend([f"# HELP dlm_{name} {text}", f"# TYPE dlm_{name} histogram"])
        below = 0
        for bound, count in zip((*values.bounds, "+Inf"), values.counts, strict=True):
            below += count
            lines.append(f'dlm_{name}_bucket{{le="{bound}"}} {below}')
        lines.extend([f"dlm_{name}_sum {values.sum:g}", f"dlm_{name}_count {below}"])

    metric("ready", "gauge", "Whether the model is loaded and requests are taken.", ("", engine.state == "ready"))
    metric("requests_waiting", "gauge", "Requests in the queue.", ("", engine.waiting))
    metric("requests_running", "gauge", "Requests that are denoised now.", ("", engine.running))
    metric("kv_cache_bytes", "gauge", "Memory of keys and values.", ("", engine.kv_used))
    outcomes = [(f'{{outcome="{name}"}}', count) for name, count in sorted(stats.outcomes.items())]
    metric("prefix_cache_bytes", "gauge", "Memory of prompts' blocks kept.", ("", engine.prefixes.bytes))
    metric("prefix_slots_total", "counter", "Slots not computed again.", ("", engine.prefixes.reused))
    metric("requests_total", "counter", "Requests that ended, by how.", *outcomes)
    metric("requests_refused_total", "counter", "Requests refused for a full queue.", ("", stats.refused))
    metric("passes_total", "counter", "Passes of the loop, all rows together.", ("", stats.passes))
    metric("row_passes_total", "counter", "Passes, counted for each row.", ("", stats.row_passes))
    metric("tokens_total", "counter", "Tokens committed.", ("", stats.tokens))
    metric("prompt_tokens_total", "counter", "Tokens given, of requests that are done.", ("", stats.prompt_tokens))
    histogram("batch_rows", "Rows of a pass.", stats.rows)
    histogram("pass_seconds", "Seconds of a pass.", stats.pass_seconds)
    histogram("queue_seconds", "Seconds that a request waited for its row.", stats.waited)
    histogram("first_text_seconds", "Seconds until the first text of a request.", stats.first_text)
    histogram("request_seconds", "Seconds of a request, waiting included.", stats.seconds)
    return "\n".join(lines) + "\n"
