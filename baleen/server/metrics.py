"""What /metrics shows, under SGLang's names, so that its dashboards and the gateways that read them work.

docs/metrics.md lists them. To add one: a line in `Metrics` for what an API process counts, in `_gauges` or `_totals`
for what the engine reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from baleen.config import PAGE_SIZE, Config
from baleen.messages import QUEUE_SECONDS, EngineStats
from baleen.server.engine_client import EngineClient
from baleen.server.shared_counters import Counter, Histogram, SharedCounters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds in seconds, as SGLang's.
_TTFT_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
_E2E_BUCKETS = (*_TTFT_BUCKETS, 600, 1200, 1800, 2400)
_ITL_BUCKETS = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2,
    4, 6, 8,
)  # fmt: skip
_TOKEN_BUCKETS = (
    10, 30, 100, 300, 500, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10000, 15000, 20000, 30000, 40000, 66000,
    99000, 132000,
)  # fmt: skip
STATUSES = (200, 204, 400, 401, 404, 405, 409, 413, 415, 422, 429, 499, 500, 501, 503)
OTHER_STATUS = 0  # shown as "other"


class Metrics:
    """Counts what this API process sees of requests, and shows it summed over all of them, with the engine's latest
    stats.

    open_sequences   submitted and not ended, now
    endpoints        (path, method) of the routes that HTTP metrics tell apart
    """

    def __init__(
        self, client: EngineClient, config: Config, counters: SharedCounters, endpoints: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._client = client
        self._config = config
        self._counters = counters
        self._labels = {"model_name": config.server.served_model_name, "engine_type": "unified"}
        self._shown: dict[str, tuple[str, Counter | Histogram]] = {}

        self.requests = self._counter("num_requests_total", "Sequences that ended, aborted ones included.")
        self.aborted_requests = self._counter(
            "num_aborted_requests_total", "Sequences ended by a client that went away or asked for it."
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of ended sequences.")
        self.cached_tokens = self._counter("cached_tokens_total", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram("inter_token_latency_seconds", "Between tokens.", _ITL_BUCKETS)
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E_BUCKETS)
        self.prompt_tokens_histogram = self._histogram("prompt_tokens_histogram", "Prompt lengths.", _TOKEN_BUCKETS)
        self.uncached_prompt_tokens_histogram = self._histogram(
            "uncached_prompt_tokens_histogram", "Prompt tokens that were not in the prefix cache.", _TOKEN_BUCKETS
        )
        self.generation_tokens_histogram = self._histogram(
            "generation_tokens_histogram", "Answer lengths.", _TOKEN_BUCKETS
        )
        self.open_sequences = Counter(counters)
        self.http_active = Counter(counters)
        for gauge in (self.open_sequences, self.http_active):
            gauge.reset()
        endpoints = [*endpoints, ("other", "other")]
        self._http_requests = {endpoint: Counter(counters) for endpoint in endpoints}
        self._http_responses = {
            (endpoint, status): Counter(counters) for endpoint in endpoints for status in (*STATUSES, OTHER_STATUS)
        }

    def render(self) -> bytes:
        """The text for Prometheus."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def http_request(self, path: str, method: str) -> tuple[str, str]:
        """A request came; returns the endpoint to name with its response."""
        endpoint = (path, method) if (path, method) in self._http_requests else ("other", "other")
        self._http_requests[endpoint].inc()
        return endpoint

    def http_response(self, endpoint: tuple[str, str], status: int) -> None:
        self._http_responses[endpoint, status if status in STATUSES else OTHER_STATUS].inc()

    def collect(self) -> Iterator[Metric]:
        """prometheus_client asks for this."""
        for name, (text, metric) in self._shown.items():
            if isinstance(metric, Counter):
                yield self._family(CounterMetricFamily, name, text, [({}, metric.total())])
            else:
                yield self._distribution(name, text, metric.bounds, *metric.total())
        stats = self._client.stats
        yield self._distribution(
            "queue_time_seconds",
            "Arrival in the engine to the first step.",
            QUEUE_SECONDS,
            stats.queue_counts_total,
            stats.queue_seconds_total,
        )
        for name, text, value in _gauges(stats, self._client, self._config):
            yield self._family(GaugeMetricFamily, name, text, [({}, value)])
        for name, text, samples in _totals(stats):
            yield self._family(CounterMetricFamily, name, text, samples)
        yield from self._http()

    def _http(self) -> Iterator[Metric]:
        yield self._family(
            CounterMetricFamily,
            "http_requests_total",
            "HTTP requests.",
            [({"endpoint": e, "method": m}, c.total()) for (e, m), c in self._http_requests.items() if c.total()],
        )
        yield self._family(
            CounterMetricFamily,
            "http_responses_total",
            "HTTP responses.",
            [
                ({"endpoint": e, "method": m, "status_code": str(status or "other")}, c.total())
                for ((e, m), status), c in self._http_responses.items()
                if c.total()
            ],
        )
        yield self._family(
            GaugeMetricFamily, "http_requests_active", "HTTP requests in work.", [({}, self.http_active.total())]
        )

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(self._counters)
        self._shown[name] = (text, counter)
        return counter

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(self._counters, bounds)
        self._shown[name] = (text, histogram)
        return histogram

    def _family(
        self,
        kind: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        text: str,
        samples: Sequence[tuple[dict[str, str], float]],
    ) -> Metric:
        """Samples of one name, each with labels of its own beside those of all."""
        own = list(samples[0][0]) if samples else []
        family = kind(_full(name), text, labels=[*self._labels, *own])
        for labels, value in samples:
            family.add_metric([*self._labels.values(), *labels.values()], value)
        return family

    def _distribution(
        self, name: str, text: str, bounds: Sequence[float], counts: Sequence[float], total: float
    ) -> Metric:
        family = HistogramMetricFamily(_full(name), text, labels=list(self._labels))
        names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        family.add_metric(list(self._labels.values()), list(zip(names, accumulate(counts))), total)
        return family


def _full(name: str) -> str:
    return name if ":" in name else f"sglang:{name}"


def num_used_pages(stats: EngineStats) -> int:
    """Pages that running requests hold; what the prefix cache could give back is not used."""
    return stats.num_pages - stats.num_free_pages - stats.num_evictable_pages


def token_usage(stats: EngineStats) -> float:
    """The share of pages that running requests hold."""
    return num_used_pages(stats) / stats.num_pages if stats.num_pages else 0.0


def cache_hit_rate(stats: EngineStats) -> float:
    """The share of all prompt tokens so far that the prefix cache had."""
    return stats.num_cached_tokens_total / stats.num_prompt_tokens_total if stats.num_prompt_tokens_total else 0.0


def _gauges(stats: EngineStats, client: EngineClient, config: Config) -> list[tuple[str, str, float]]:
    """(name, help, value). The three of `vllm:` are what the Kubernetes gateway reads unless it is told otherwise."""
    page = PAGE_SIZE
    usage = token_usage(stats)
    return [
        ("num_running_reqs", "Sequences in the running batch.", stats.num_running),
        ("num_queue_reqs", "Sequences waiting.", stats.num_waiting),
        ("num_grammar_queue_reqs", "Sequences whose grammar is being compiled.", stats.num_grammar_queue),
        ("num_retracted_reqs", "Sequences waiting that ran before.", stats.num_retracted),
        ("token_usage", "Share of the KV pages held by running sequences.", usage),
        ("full_token_usage", "The same: every layer caches every token.", usage),
        ("cache_hit_rate", "Share of prompt tokens found in the prefix cache.", cache_hit_rate(stats)),
        ("gen_throughput", "Tokens generated per second, of late.", client.throughput),
        ("decode_sum_seq_lens", "Tokens of the sequences past their prompt.", stats.num_decoding_tokens),
        ("num_used_tokens", "KV tokens in pages held by running sequences.", num_used_pages(stats) * page),
        ("kv_used_tokens", "KV tokens in pages held by running sequences.", num_used_pages(stats) * page),
        ("kv_available_tokens", "KV tokens in free pages.", stats.num_free_pages * page),
        ("kv_evictable_tokens", "KV tokens in cached pages that no sequence uses.", stats.num_evictable_pages * page),
        ("max_total_num_tokens", "KV tokens there is room for.", config.cache.max_total_tokens),
        ("num_pages", "KV pages.", stats.num_pages),
        ("page_size", "Tokens in a KV page.", page),
        ("context_len", "Longest sequence, prompt and answer.", config.load.context_length),
        ("engine_load_weights_time", "Seconds that loading the weights took.", client.load_seconds),
        ("vllm:num_requests_running", "As sglang:num_running_reqs.", stats.num_running),
        ("vllm:num_requests_waiting", "As sglang:num_queue_reqs.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "As sglang:token_usage.", usage),
    ]


def _totals(stats: EngineStats) -> list[tuple[str, str, list[tuple[dict[str, str], float]]]]:
    """(name, help, [(labels, value)])."""
    computed = stats.num_prompt_tokens_total - stats.num_cached_tokens_total
    return [
        ("num_retracted_requests_total", "Sequences put back into the queue.", [({}, stats.num_retractions_total)]),
        ("num_timeouts_total", "Sequences ended by a waiting or running timeout.", [({}, stats.num_timeouts_total)]),
        ("evicted_tokens_total", "Cached tokens given up.", [({}, stats.num_evicted_pages_total * PAGE_SIZE)]),
        (
            "realtime_tokens_total",
            "Tokens by how they came to be.",
            [
                ({"mode": "prefill_compute"}, computed),
                ({"mode": "prefill_cache"}, stats.num_cached_tokens_total),
                ({"mode": "decode"}, stats.num_generated_tokens_total),
            ],
        ),
        ("forward_execution_seconds_total", "In the model's forward.", [({}, stats.forward_seconds_total)]),
        ("num_steps_total", "Engine steps.", [({}, stats.num_steps_total)]),
        ("num_grammar_total", "Grammars compiled.", [({}, stats.num_grammar_compiled_total)]),
        ("num_grammar_aborted_total", "Grammars that do not compile.", [({}, stats.num_grammar_failed_total)]),
        ("grammar_compile_seconds_total", "Compiling grammars.", [({}, stats.grammar_compile_seconds_total)]),
        ("grammar_mask_seconds_total", "Working out masks.", [({}, stats.grammar_mask_seconds_total)]),
        ("grammar_wait_seconds_total", "Waiting for masks.", [({}, stats.grammar_wait_seconds_total)]),
    ]
