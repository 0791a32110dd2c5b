"""What the service counts, for Prometheus (``/metrics``), in a registry of its own: a process may hold two services."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector

from bowerbird.gallery.gallery import Gallery

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service.

    Cheap to call from the event loop and from threads. Labels never come from clients: a route is its template, an
    unknown path is ``other``.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, gallery: Gallery) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "bowerbird_http_requests", "Answered requests.", ("route", "method", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "bowerbird_http_request_seconds",
            "Until the response began.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("bowerbird_http_requests_in_flight", "Requests being answered.", registry=self.registry)
        self._gone = Counter(
            "bowerbird_http_clients_gone", "Requests given up because the client went away.", registry=self.registry
        )
        self._searches = Counter("bowerbird_searches", "Queries searched.", ("kind",), registry=self.registry)
        self._search_seconds = Histogram(
            "bowerbird_search_seconds", "One search call, of all its queries.", buckets=SECONDS, registry=self.registry
        )
        self._batch = Histogram(
            "bowerbird_batch_size", "Requests answered together.", ("of",), buckets=SIZES, registry=self.registry
        )
        self._queue = Gauge("bowerbird_queue_length", "Requests that wait.", ("of",), registry=self.registry)
        self._encoded = Counter("bowerbird_encoded", "Pictures and texts encoded for requests.", registry=self.registry)
        self._restarts = Counter("bowerbird_upgrade_worker_restarts", "Workers started again.", registry=self.registry)
        self.gauge("bowerbird_items", "Items of the gallery.", lambda: len(gallery))
        self.gauge("bowerbird_epoch", "Number of the last commit.", lambda: gallery.snapshot().epoch)
        self.gauge("bowerbird_upgrade_running", "1 while an upgrade is under way.", lambda: _running(gallery))
        self.gauge("bowerbird_upgrade_share", "Of the items in the new space, 0 to 1.", lambda: _share(gallery))

    # ------------------------------------------------------------------------------------------- told by the parts

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """``route``: its template, such as ``/v1/search/image``."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def client_gone(self) -> None:
        self._gone.inc()

    def searched(self, kind: str, seconds: float, queries: int = 1) -> None:
        """``kind``: image, text, item, vector, compare."""
        self._searches.labels(kind).inc(queries)
        self._search_seconds.observe(seconds)

    def batch(self, of: str, size: int) -> None:
        """``of``: encode or search."""
        self._batch.labels(of).observe(size)
        if of == "encode":
            self._encoded.inc(size)

    def queue(self, of: str, length: int) -> None:
        """``of``: encode, search or decode."""
        self._queue.labels(of).set(length)

    def worker_restarted(self) -> None:
        self._restarts.inc()

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is asked for its value when it is read. A value that cannot be had is NaN, not an error."""
        Gauge(name, text, registry=self.registry).set_function(lambda: _or_nan(value))

    def render(self) -> bytes:
        """The text that Prometheus reads. Blocks: it asks the gallery."""
        return generate_latest(self.registry)


def _running(gallery: Gallery) -> float:
    return float(gallery.snapshot().upgrade is not None)


def _share(gallery: Gallery) -> float:
    snapshot = gallery.snapshot()
    if snapshot.upgrade is None:
        return 1.0
    counts = [part.count for part in snapshot.parts]
    return counts[-1] / sum(counts) if sum(counts) else 1.0


def _or_nan(value: Callable[[], float]) -> float:
    try:
        return float(value())
    except Exception:  # one value less, and all others are still there for whoever looks for the reason
        return math.nan
