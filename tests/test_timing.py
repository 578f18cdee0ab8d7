"""Times of several in turns: `modelnew.timing`."""

import gc
import types

import pytest
import torch

from modelnew import timing
from modelnew.timing import Clock, Contender, Times, measure_together

CPU = torch.device("cpu")


def test_all_take_turns():
    log = []
    entrants = [Contender(name, "nchw", lambda name=name: lambda: log.append(name)) for name in ("a", "b", "c")]
    entrants[1].check = lambda: "parity fails: planted"
    seen = []
    measure_together(entrants, Clock(CPU), 3, lambda e: None, seen.append)
    assert seen == ["a nchw", "b nchw", "c nchw"]
    assert log == ["a", "c"] + ["a", "c"] * 3
    assert (entrants[1].reason, entrants[1].failed, entrants[1].times) == ("parity fails: planted", True, None)
    assert entrants[0].times.min <= entrants[0].times.median <= entrants[0].times.max


def test_what_fails_in_a_trial_drops_out():
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    entrants = [Contender("eager", "nchw", lambda: fails_later), Contender("compile", "nchw", lambda: lambda: None)]
    measure_together(entrants, Clock(CPU), 5, lambda e: None, lambda text: None)
    assert len(calls) == 3
    assert entrants[0].row(n=1)["reason"] == "out of memory"
    assert entrants[1].times


@pytest.mark.parametrize(("latency", "waits"), [(False, "c c c wait"), (True, "c wait c wait c wait wait")])
def test_calls_one_after_another(monkeypatch, latency, waits):
    """The time is a call's, whatever else the garbage collector has to do."""
    log, seconds = [], iter((10.0, 10.6))
    clock = Clock(CPU, latency=latency)
    monkeypatch.setattr(clock, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))
    read = clock.time(lambda: log.append("gc" if gc.isenabled() else "c"), 3)
    assert log == ["wait", *waits.split()]
    assert read() == pytest.approx(200)
    assert gc.isenabled()


def test_a_trial_lasts_long_enough(monkeypatch):
    """All trials of a contender have the same number of calls, which its row tells."""
    log, now = [], [0.0]

    def call():
        log.append(1)
        now[0] += 0.0004

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    entrants = [Contender("eager", "nchw", lambda: call)]
    measure_together(entrants, Clock(CPU, 9.9), 3, lambda e: None, lambda text: None)
    assert len(log) == 1 + timing._ESTIMATE + 3 * 25
    assert entrants[0].row()["calls"] == 25
    assert entrants[0].row()["ms"] == pytest.approx(0.4)
    log.clear()
    measure_together(entrants, Clock(CPU, 0), 3, lambda e: None, lambda text: None)
    assert len(log) == 1 + 3
    assert "calls" not in entrants[0].row()


def test_events_time_one_call(monkeypatch):
    """In torch's stream, after the flushes during which the host runs ahead."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 0.25

    clock = Clock(CPU)
    clock.gpu = clock.events = True
    clock.flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clock.time(lambda: log.append("call"))() == 0.25
    assert log == ["flush"] * timing._FLUSHES + ["event", "call", "event"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_is_of_one_call():
    """The thread of autograd may hold a call's memory until the next call, or the next contender, has begun."""
    x = torch.randn(1 << 22, device="cuda", requires_grad=True)

    def step():
        return torch.autograd.grad(x.sin().exp(), x, x)

    entrants = [Contender("eager", "nchw", lambda: step) for _ in range(30)]
    measure_together(entrants, Clock(x.device), 2, lambda e: None, lambda text: None)
    assert len({entrant.peak_mb for entrant in entrants}) == 1


def test_measure():
    calls = []
    times = timing.measure(lambda: calls.append(1), CPU, trials=4)
    assert len(calls) == 5
    assert 0 < times.min <= times.median <= times.max


def test_rounding():
    assert timing.rounded(0.123456789) == 0.12346
    assert Contender("eager", "nchw", None).row.__doc__
    entrant = Contender("eager", "nchw", None)
    entrant.times, entrant.peak_mb = Times(1.0000001, 0.5, 2.0), 12.3
    expected = {"n": 1, "who": "eager", "layout": "nchw", "ms": 1.0, "ms_min": 0.5, "ms_max": 2.0, "peak_mb": 12.3}
    assert entrant.row(n=1) == expected
