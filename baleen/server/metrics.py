"""What /metrics shows, under SGLang's names, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from baleen.messages import EngineStats
from baleen.server.engine_client import EngineClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds in seconds, as SGLang's.
_TTFT_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
_E2E_BUCKETS = (*_TTFT_BUCKETS, 600, 1200, 1800, 2400)
_ITL_BUCKETS = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2,
    4, 6, 8,
)  # fmt: skip


class Metrics:
    """Counts what the API process sees of requests, and shows the engine's latest stats beside it."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineGauges(client, model_name))

        def counter(name: str, text: str) -> Counter:
            return Counter(f"sglang:{name}", text, ["model_name"], registry=self._registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"sglang:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            return metric.labels(model_name)

        self.requests = counter("num_requests_total", "Sequences that ended, aborted ones included.")
        self.aborted_requests = counter("num_aborted_requests_total", "Sequences ended by a client that went away.")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of ended sequences.")
        self.cached_tokens = counter("cached_tokens_total", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated.")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens.", _ITL_BUCKETS)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E_BUCKETS)

    def render(self) -> bytes:
        """The text for Prometheus."""
        return generate_latest(self._registry)


def token_usage(stats: EngineStats) -> float:
    """The share of pages that running requests hold; what the prefix cache could give back counts as free."""
    held = stats.num_pages - stats.num_free_pages - stats.num_evictable_pages
    return held / stats.num_pages if stats.num_pages else 0.0


def cache_hit_rate(stats: EngineStats) -> float:
    """The share of all prompt tokens so far that the prefix cache had."""
    return stats.num_cached_tokens_total / stats.num_prompt_tokens_total if stats.num_prompt_tokens_total else 0.0


class _EngineGauges:
    """Reads the engine's stats when Prometheus asks."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        values = {
            "num_running_reqs": ("Sequences in the running batch.", stats.num_running),
            "num_queue_reqs": ("Sequences waiting.", stats.num_waiting),
            "token_usage": ("Share of the KV pages held by running sequences.", token_usage(stats)),
            "cache_hit_rate": ("Share of prompt tokens found in the prefix cache.", cache_hit_rate(stats)),
            "num_retracted_reqs": ("Retractions since start.", stats.num_retractions_total),
            "num_pages": ("KV pages.", stats.num_pages),
        }
        for name, (text, value) in values.items():
            gauge = GaugeMetricFamily(f"sglang:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        totals = {
            "forward_execution_seconds_total": ("Time in the model's forward.", stats.forward_seconds_total),
            "num_steps_total": ("Engine steps.", stats.num_steps_total),
        }
        for name, (text, value) in totals.items():
            total = CounterMetricFamily(f"sglang:{name}", text, labels=["model_name"])
            total.add_metric([self._model_name], value)
            yield total
