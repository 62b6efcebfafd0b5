"""What bounds a visitor's requests."""

import errno

import pytest

from ldmseg_fast.app import limits as module
from ldmseg_fast.app.limits import Cancelled, Limits, Refused, TimeOver
from ldmseg_fast.app.metrics import PrometheusMetrics
from ldmseg_fast.app.work import Settings
from ldmseg_fast.errors import ArgumentError


@pytest.fixture
def counted():
    return Limits(metrics=PrometheusMetrics(lambda: 3))


def numbers(limits):
    lines = limits.metrics.text().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_a_request_is_counted(counted, worker, scene):
    with counted.work("segment", "a") as stop:
        assert counted.running() == 1
        counted.metrics.segments(len(worker.segment(scene[0], None, stop).result.segments_info))
    found = numbers(counted)
    assert found['ldmseg_requests_total{outcome="done",work="segment"}'] == 1
    assert found['ldmseg_request_seconds_count{work="segment"}'] == 1
    assert found["ldmseg_segments_total"] > 0 and found["ldmseg_queue"] == 3 and found["ldmseg_running"] == 0
    assert counted.running() == 0


def test_work_ends_between_sampling_steps_when_its_time_is_over(worker, scene):
    limits = Limits(timeout=0.0)
    with pytest.raises(TimeOver, match="over 0 seconds"), limits.work("segment") as stop:
        worker.segment(scene[0], Settings(steps=100), stop)


def test_a_visitor_cancels_their_own_work_only(counted):
    with counted.work("segment", "a", "1") as first, counted.work("segment", "b", "2") as second:
        assert counted.cancel("a") == 1
        second()
        with pytest.raises(Cancelled):
            first()
        assert counted.cancel("nobody") == counted.cancel("") == counted.cancel_event("") == 0
        assert counted.cancel_event("2") == 1
        with pytest.raises(Cancelled):
            second()


def test_work_ends_when_its_visitor_has_left(monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.0)
    limits = Limits()
    limits.arrive("a")
    with limits.work("segment", "a") as stop:
        stop()
        limits.arrive("a")
        limits.leave("a")
        stop()  # the first connection is still there
        limits.leave("a")
        with pytest.raises(Cancelled, match="has left"):
            stop()
        limits.arrive("a")
        stop()  # and is back
        limits.leave("a", finished=True)
        stop()


def test_visitors_who_left_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "GRACE", -1.0)
    limits = Limits()
    for number in range(100):
        limits.arrive(str(number))
        limits.leave(str(number))
    assert len(limits._left) <= 1 and not limits._streams


@pytest.mark.parametrize(
    ("error", "raised", "outcome"),
    [
        (ArgumentError("steps=0"), ArgumentError, "refused"),
        (OSError(errno.ENOSPC, "No space left on device"), Refused, "refused"),
        (MemoryError(), Refused, "refused"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Refused, "refused"),
        (RuntimeError("a fault"), RuntimeError, "error"),
        (KeyError("a fault"), KeyError, "error"),
        (OSError(errno.EIO, "broken"), OSError, "error"),
        (Cancelled("stopped"), Cancelled, "cancelled"),
        (TimeOver("late"), TimeOver, "timeout"),
    ],
    ids=lambda value: None,
)
def test_errors_are_told_apart(counted, error, raised, outcome):
    with pytest.raises(raised) as caught, counted.work("segment"):
        raise error
    assert type(caught.value) is raised and "\n" not in str(caught.value)
    assert numbers(counted)[f'ldmseg_requests_total{{outcome="{outcome}",work="segment"}}'] == 1
    assert numbers(counted)["ldmseg_errors_total"] == (outcome == "error")
