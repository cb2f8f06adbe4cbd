"""What the server counts, for Prometheus: numbers alone, never a text. Knows no route and no model."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, queue: Callable[[], int], ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry, "namespace": "latentguard"}
        self.requests = Counter("requests", "Requests answered", ["route", "status"], **own)
        self.seconds = Histogram("request_seconds", "From a request's head to its answer", ["route"], buckets=_SECONDS, **own)
        self.active = Gauge("requests_in_progress", "Requests being read, waiting or scored", **own)
        self.gone = Counter("requests_gone", "Requests whose client left before the answer", **own)
        self.prompts = Counter("prompts", "Texts scored and answered", **own)
        self.flagged = Counter("flagged", "Texts flagged", ["category", "threshold"], **own)
        self.tokens = Counter("tokens", "Tokens of the texts run through the model, their template left out", **own)
        self.probability = Histogram("probability", "Scores given", ["category"], buckets=[i / 20 for i in range(1, 21)], **own)
        self.batch_prompts = Histogram("batch_prompts", "Texts of a batch", buckets=_SIZES, **own)
        self.batch_seconds = Histogram("batch_seconds", "Time of a batch", buckets=_SECONDS, **own)
        self.failures = Counter("failures", "Texts the model failed at, for no fault of theirs", **own)
        Gauge("queue_prompts", "Texts waiting", **own).set_function(queue)
        Gauge("ready", "1 while the model answers", **own).set_function(lambda: float(ready()))

    def batch(self, prompts: int, tokens: int, seconds: float) -> None:
        """One batch was run."""
        self.batch_prompts.observe(prompts)
        self.batch_seconds.observe(seconds)
        self.tokens.inc(tokens)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
