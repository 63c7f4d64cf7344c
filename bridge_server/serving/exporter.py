"""The exporter of --metrics: a worker's numbers for Prometheus. Imports no framework."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb

# Field, name, type and help.
_OF_RUNS = (
    ("count", "requests", "counter", "Runs of programs."),
    ("queue_s", "queue_seconds", "counter", "Seconds that runs waited for their turn."),
    ("compute_s", "compute_seconds", "counter", "Seconds in which programs ran."),
    (
        "copy_s",
        "copy_seconds",
        "counter",
        "Seconds in which outputs were copied to the clients' memory.",
    ),
    ("output_bytes", "output_bytes", "counter", "Bytes of outputs."),
    ("compiles", "compiles", "counter", "Programs traced and compiled."),
    (
        "compile_s",
        "compile_seconds",
        "counter",
        "Seconds of tracing and compiling.",
    ),
)
_OF_WORKER = (
    ("uptime_s", "uptime_seconds", "gauge", "Seconds since the worker's start."),
    ("sessions", "sessions", "gauge", "Open sessions."),
    ("lanes", "lanes", "gauge", "Open lanes."),
    ("running", "running", "gauge", "Runs under way."),
    ("waiting", "waiting", "gauge", "Runs that wait for their turn."),
    ("refused", "refused", "counter", "Runs refused, since too many waited."),
    ("residuals", "residuals", "gauge", "Residuals that are kept."),
    ("residual_bytes", "residual_bytes", "gauge", "Bytes of the residuals."),
    ("evictions", "evictions", "counter", "Residuals that were evicted."),
    ("slab_bytes", "slab_bytes", "gauge", "Bytes of the clients' shared memory."),
)

_EDGES = range(4, 31, 2)  # from 16 us to 18 minutes


def export(address: tuple[str, int], read: Callable[[], pb.Statistics]) -> int:
    """Serve the numbers over HTTP at a host and port until the process ends; return the port.

    Raises:
      CallerError: prometheus-client is not installed, or the address cannot be used.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise CallerError(
            "--metrics needs prometheus-client in the worker's environment; run `pip install"
            " 'torch-jax-bridge[metrics]'` there"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(read))
    host, port = address
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise CallerError(
            f"--metrics cannot listen on {host}:{port}: {error.strerror}"
        ) from error
    return int(server.server_port)


class _Collector:
    """Makes metrics of the worker's numbers at each scrape."""

    def __init__(self, read: Callable[[], pb.Statistics]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        numbers = self._read()
        for field, name, kind, text in _OF_RUNS:
            family = _family(kind, name, text, ("model", "derivative"))
            for runs in numbers.runs:
                family.add_metric(
                    (runs.model, runs.derivative), float(getattr(runs, field))
                )
            yield family
        yield _times_of(numbers.runs)
        errors = _family("counter", "errors", "Errors sent to clients.", ("kind",))
        for error in numbers.errors:
            errors.add_metric((error.kind,), float(error.count))
        yield errors
        for field, name, kind, text in _OF_WORKER:
            family = _family(kind, name, text, ())
            family.add_metric((), float(getattr(numbers, field)))
            yield family


def _times_of(by_label: Iterable[pb.Statistics.Runs]) -> Any:
    """Return the histogram of the runs' times: what Statistics counts by powers of two, by powers
    of four."""
    from prometheus_client.core import HistogramMetricFamily

    text = "Seconds of a run: computing and copying."
    labels = "model", "derivative"
    family = HistogramMetricFamily("bridge_run_seconds", text, labels=labels)
    for runs in by_label:
        buckets = [(f"{2**k / 1e6}", sum(runs.times[: k + 1])) for k in _EDGES]
        buckets.append(("+Inf", sum(runs.times)))
        total_s = runs.compute_s + runs.copy_s
        family.add_metric((runs.model, runs.derivative), buckets, total_s)
    return family


def _family(kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    return make(f"bridge_{name}", text, labels=labels)
