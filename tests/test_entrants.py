"""Those who take part in a workload of `bench`, and the checks of their results."""

import contextlib
import sys

import pytest
import torch

from modelnew import entrants, functional, workloads
from modelnew.entrants import Case

# Where the layer and the fused chain find their function.
FILES = [sys.modules[f"modelnew.functional.{name}"] for name in ("conv_transpose", "conv_bn_pool")]

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("what", ["forward_train", "forward_eval", "conv_forward", "dgrad", "wgrad", "step"])
def test_checks_find_small_errors(device, small, monkeypatch, what):
    right = functional.conv_transpose2d
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        assert entrants.check(case, what, "fp32") is None

    def slightly_wrong(*args, **options):
        y = right(*args, **options)
        return y + 1e-4 * y.roll(1, -1)

    for where in (functional, *FILES):
        monkeypatch.setattr(where, "conv_transpose2d", slightly_wrong)
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        assert "parity fails" in entrants.check(case, what, "fp32")


def test_check_of_what_follows_the_convolution(device, small):
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        assert entrants.check(case, "post_conv_forward", "fp32") is None
        case.model.group_norm.eps = 2e-5
        assert "parity fails" in entrants.check(case, "post_conv_forward", "fp32")


@pytest.mark.parametrize("what", workloads.KERNELS)
def test_kernels_alone(device, fusible, launched, what):
    """Each call launches these kernels and no others, and computes all of its result again."""
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        alone = entrants.build(case, what, "fp32", "modelnew", "nchw")
        launched.clear()
        alone()
        found = tuple(kernel.name for kernel in launched)
        assert entrants.check(case, what, "fp32") is None
        torch.from_dlpack(alone.launches[0][3][0]).zero_()  # the first kernel's first operand, x or packed dy
        assert "parity fails: launched again" in alone.differs()
    assert found == entrants._LAUNCHES[what][0]


@pytest.mark.parametrize("what", workloads.CHAINS)
def test_other_chains_are_fused_and_checked(device, fusible, launched, what):
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        assert entrants.check(case, what, "fp32") is None
        structs = {dict(k.defines)["ACTIVATION"] for k in launched if k.name == "pooled_forward"}
        assert structs == {"LeakyReLU"}
        other = Case(3, 6, torch.device(device))
        other.leaky_relu.model.tanh.negative_slope = 0.011
        assert "parity fails" in entrants.check(other, what, "fp32")


def test_dgrad_alone_is_the_gradient(device, fusible):
    case = Case(3, 6, torch.device(device))
    with entrants.numerics("fp32", case.device):
        step = entrants.build(case, "step", "fp32", "modelnew", "nchw")()
        for what, gradient in (("dgrad_kernel", step[0]), ("wgrad_kernel", step[1])):
            (result,) = entrants.build(case, what, "fp32", "modelnew", "nchw")()
            assert torch.equal(result, gradient)


@pytest.mark.parametrize("training", [True, False])
def test_truth_in_parts(small, monkeypatch, training):
    monkeypatch.setattr(entrants, "_CHUNK", 2)
    monkeypatch.setattr(entrants, "_CHECKED_IMAGES", 3)
    case = Case(5, 6, CPU)
    assert case.picked.tolist() == [0, 2, 4]
    whole = case.model_of("eager").double().train(training)(case.x.double())
    torch.testing.assert_close(case.truth(training), whole[case.picked])
    assert not case.model.batch_norm.running_mean.any()


def test_truth_of_wgrad_sums_all_parts(small, monkeypatch):
    monkeypatch.setattr(entrants, "_CHUNK", 2)
    case = Case(5, 6, CPU)
    truth, terms = entrants._truth_of(case, "wgrad", "fp32")
    x, w, dy = entrants._conv_tensors(case, "fp32")
    whole = entrants._conv("wgrad", case, torch.nn.functional.conv_transpose2d, x.double(), w.double(), dy.double())
    torch.testing.assert_close(truth, whole())
    assert terms == 5 * 6 * 6


def test_who_replays_graphs(small, monkeypatch):
    """ModelNew and PyTorch are captured in the same way; results of reduce-overhead are given up before each call."""
    log = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: log.append("new step"))
    case = Case(3, 6, CPU)
    built = {who: entrants.build(case, "step", "fp32", who, "nhwc") for who in ("modelnew", "eager", *workloads.GRAPHS)}
    graphed = {who: call for who, call in built.items() if isinstance(call, entrants._Graphed)}
    assert graphed.keys() == {"modelnew-graph", "eager-graph"}
    for who in ("modelnew", "eager"):
        for ours, captured in zip(built[who](), graphed[f"{who}-graph"]()):
            assert torch.equal(ours, captured)
    assert not log
    for _ in range(2):
        built["compile-reduce-overhead"]()
    assert log == ["new step"] * 2


def test_graphed(monkeypatch):
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        log.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphed = entrants._Graphed(lambda: log.append("call") or len(log))
    assert graphed() == 1
    assert graphed() == graphed() == 3
    assert log == ["call", "capture", "call", "replay", "replay"]
