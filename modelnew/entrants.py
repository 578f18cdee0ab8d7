"""The contenders of each workload of `workloads`: functions that do the work once, and the check of their results."""

import contextlib
import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cupy_kernels.conv_bn_pool import pooled_places
from cupy_kernels.errors import UnsupportedError
from cupy_kernels.launch import launch, observed
from cupy_kernels.source import signature

from . import functional, layers
from .interop import launching_on
from .model import Model, ModelNew, fused_model, get_init_inputs
from .numerics import without_tensor_cores
from .parity import CLASSES as PRECISE
from .parity import compare_models, error, multiplied_in_tf32, tf32, tf32_rounded, within_policy
from .workloads import (
    CHAINS,
    COMPILED,
    DTYPES,
    FLOAT16,
    GENERAL,
    GRAPHED,
    GRAPHS,
    KERNELS,
    LAYOUTS,
    LEAKY_RELU,
    MODES,
    OF_COMPILED,
    OF_FLOAT16,
    Shape,
    layout_of,
)

# For each workload of KERNELS: the kernels that it launches, and the arrays that the last of them writes.
_LAUNCHES = {
    "conv_bn_pool_kernel": (("conv_bn_pool",), ("pooled", "partials")),
    "dgrad_kernel": (("conv_transpose_mma",), ("y",)),
    "wgrad_kernel": (("conv_wgrad_mma", "conv_wgrad_reduce"), ("dw",)),
}
_NO_GRAD = ("forward_train", "latency_forward_train", "forward_eval", "post_conv_forward")
_CHECKED_IMAGES = 16
_CHUNK = 64  # images whose float64 convolution is held at once
_GRADIENT_IMAGES = 512  # a float64 step of more takes tens of GB


class Case:
    """The model and the batch of n images that all workloads share, and the float64 results for their checks."""

    def __init__(self, n: int, size: int, device: torch.device, seed: int = 0, leaky: bool = False):
        self.n, self.device, self.seed, self.leaky = n, device, seed, leaky
        self.init = get_init_inputs()
        self.shape = Shape(*self.init[:5], size)
        torch.manual_seed(seed)
        self.model = Model(*self.init, device=device)
        if leaky:
            self.model.tanh = nn.LeakyReLU()
        self.picked = torch.linspace(0, n - 1, min(n, _CHECKED_IMAGES), device=device).long()
        self.truth = functools.cache(lambda training: _truth(self.model, self.x, training, self.picked))
        self.gradients_differ = functools.cache(self._gradients_differ)
        # One result for all: cuDNN need not give the same bits twice.
        self.hidden = functools.lru_cache(1)(self._hidden)

    @functools.cached_property
    def leaky_relu(self) -> "Case":
        """The same case with LeakyReLU instead of tanh."""
        other = Case(self.n, self.shape.size, self.device, self.seed, leaky=True)
        other.x = self.x
        return other

    @functools.cached_property
    def float16(self) -> "Case":
        """The same case with parameters and a batch that float16 can represent."""
        other = Case(self.n, self.shape.size, self.device, self.seed)
        other.model.half().float()
        other.x = self.x.half().float()
        return other

    @functools.cached_property
    def x(self) -> torch.Tensor:
        """The batch, uniform in [0, 1) as from get_inputs(), generated on the device."""
        shape = (self.n, self.shape.in_channels, self.shape.size, self.shape.size)
        return torch.rand(shape, generator=self._generator(), device=self.device)

    def normal(self, channels: int, size: int, dtype=torch.float32) -> torch.Tensor:
        """Incoming gradients: the same values at each call."""
        shape = (self.n, channels, size, size)
        return torch.randn(shape, generator=self._generator(), device=self.device).to(dtype)

    def model_of(self, who: str) -> nn.Module:
        """A new model with the state of Case.model."""
        if not who.startswith("modelnew"):
            return copy.deepcopy(self.model)
        model = self._new()
        model.load_state_dict(self.model.state_dict())
        return model

    def _hidden(self, cls) -> torch.Tensor:
        """The output of PyTorch's convolution."""
        with torch.no_grad():
            return self.model.conv_transpose(self.x).to(DTYPES[cls])

    def _gradients_differ(self, cls) -> str | None:
        rows = compare_models(self.model, self._new(), self.x[:_GRADIENT_IMAGES], cls)
        bad = [
            f"{row.what} (rms error {row.ours.rms:.1e}, PyTorch's {row.torch.rms:.1e})" for row in rows if not row.ok
        ]
        return f"parity fails: {', '.join(bad)}" if bad else None

    def _new(self):
        model = ModelNew(*self.init, device=self.device)
        if self.leaky:
            model.tanh = layers.LeakyReLU()
        return model

    def _generator(self):
        return torch.Generator(self.device).manual_seed(self.seed)


def build(case: Case, what: str, cls: str, who: str, layout: str) -> Callable:
    """A function without arguments that does the work once and returns its result. Call it inside `numerics(cls)`.

    Raises UnsupportedError, with the reason, if the model does not run the kernels of `what`.
    """
    if what in KERNELS:
        return _Alone(what, case)
    if what in CHAINS:
        return build(case.leaky_relu, what.removeprefix(LEAKY_RELU), cls, who, layout)
    if what in COMPILED:
        return build(case, what.removeprefix(OF_COMPILED), cls, who, layout)
    if what in FLOAT16:
        case = case.float16
        return _built(what.removeprefix(OF_FLOAT16), case, case.model_of(who).half(), case.x.half(), who, layout)
    if what.removesuffix(GENERAL) in ("conv_forward", "dgrad", "wgrad"):
        function = functional.conv_transpose2d if who == "modelnew" else F.conv_transpose2d
        tensors = (t.to(memory_format=LAYOUTS[layout]) for t in _conv_tensors(case, cls))
        return _conv(what, case, function, *tensors)
    model, x = case.model_of(who), case.x
    if what == "post_conv_forward":
        model.conv_transpose, x = nn.Identity(), case.hidden(cls)
    return _built(what, case, model, x, who, layout)


def _built(what, case, model, x, who, layout):
    model.to(memory_format=LAYOUTS[layout]).train(what != "forward_eval")
    if who in MODES:
        model = torch.compile(model, mode=MODES[who], fullgraph=True, dynamic=False)
    call = _model(what, case, model, x.to(memory_format=LAYOUTS[layout]), layout)
    if who in GRAPHED:
        return _Graphed(call)
    return _new_step(call) if who in GRAPHS else call


def check(case: Case, what: str, cls: str, who: str = "modelnew") -> str | None:
    """What is wrong with our result, or None. who: one of ours. Call it inside `numerics(cls)`.

    The error against float64 must be no worse than PyTorch's. What is checked depends on the workload:
    - outputs and gradients of operators: the whole batch for sums over images, otherwise some of its images;
    - steps: their output; in the classes of float32 tensors, also every gradient and the running statistics, over at
      most 512 images of the batch;
    - kernels alone: the call that they were taken from. Launched again, they must also write the same bits.
    """
    if what in CHAINS:
        return check(case.leaky_relu, what.removeprefix(LEAKY_RELU), cls, who)
    if what in COMPILED:
        return check(case, what.removeprefix(OF_COMPILED), cls, who)
    if what in KERNELS:
        call = "forward_train" if what == "conv_bn_pool_kernel" else "step"
        return check(case, call, cls, who) or build(case, what, cls, who, "nchw").differs()
    if what == "float16_step":
        return check(case, "float16_forward_train", cls, who)
    if what.startswith("step"):
        differ = case.gradients_differ(cls) if cls in PRECISE else None
        return differ or check(case, "forward_train_grad", cls, who)
    call = build(case, what, cls, who, layout_of(what))
    if who in GRAPHS:
        call()
    ours, theirs = (f().detach() for f in (call, build(case, what, cls, "eager", layout_of(what))))
    if what.removesuffix(GENERAL) != "wgrad":
        ours, theirs = ours[case.picked], theirs[case.picked]
    truth, terms = _truth_of(case, what, cls)
    errors = [error(ours, truth), error(theirs, truth)]
    if cls == "tf32" and what != "post_conv_forward":
        rounding = error(_truth_of(case, what, cls, tf32_rounded)[0], truth)
        if not multiplied_in_tf32(errors[1], rounding):  # as for few images, and in wgrad of NCHW
            errors[1] = rounding
    if within_policy(ours, truth, *errors, terms):
        return None
    return "parity fails: error rms {:.2e}, max {:.2e}; PyTorch's {:.2e}, {:.2e}".format(*errors[0], *errors[1])


@contextlib.contextmanager
def numerics(cls: str, device: torch.device, what: str | None = None):
    """A context with a class's settings: TF32 on or off; autocast for 16 bits, unless the tensors have them."""
    dtype, lower = DTYPES[cls], cls not in PRECISE and what not in FLOAT16
    with tf32(cls == "tf32"), torch.autocast(device.type, dtype if lower else None, lower, cache_enabled=False):
        yield


def _new_step(call):
    """call, for which the CUDA graphs of torch.compile may overwrite the results of the calls before."""

    def marked():
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return marked


class _Graphed:
    """A function whose first call runs as usual, which compiles its kernels. Later calls replay a CUDA graph."""

    def __init__(self, call):
        self.call, self.calls, self.graph, self.result = call, 0, None, None

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            return self.call()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result


class _Alone:
    """Repeats some launches of one call of ModelNew on the memory that the call prepared for them."""

    def __init__(self, what, case):
        model = case.model_of("modelnew").train()
        plan, reason = fused_model(model, case.x)
        if reason:
            raise UnsupportedError(reason)
        call = _model("forward_train" if what == "conv_bn_pool_kernel" else "step", case, model, case.x, "nchw")
        names, written = _LAUNCHES[what]
        launches = []
        with observed(lambda *launched: launches.append(launched)):
            call()
        self.device, self.launches = case.x.device, [each for each in launches if each[0].name in names]
        if not self.launches:
            raise UnsupportedError(f"the call launches no {names[-1]}")
        kernel, *_, args, _ = self.launches[-1]
        arrays = dict(zip((parameter.name for parameter in signature(kernel)), args))
        self.results = [torch.from_dlpack(arrays[name]) for name in written]
        # The places of pooled sums that belong to a window; nobody reads the others.
        self.places = torch.from_numpy(pooled_places(plan).ravel()).to(self.device) if "pooled" in written else None

    def __call__(self):
        with launching_on(self.device):
            for launched in self.launches:
                launch(*launched)
        return self.results

    def values(self):
        """The results, without the unused parts."""
        if self.places is None:
            return self.results
        return [self.results[0].index_select(-1, self.places), *self.results[1:]]

    def differs(self) -> str | None:
        """What is wrong if the kernels, launched again, do not write the same bits."""
        before = [value.clone() for value in self.values()]
        for result in self.results:
            result.fill_(float("nan"))
        self()
        same = all(map(torch.equal, before, self.values()))
        return None if same else "parity fails: launched again, the kernels write other values"


def _model(what, case, model, x, layout):
    if what in _NO_GRAD:

        def forward():
            with torch.no_grad():
                return model(x)

        return forward
    x = x.detach().requires_grad_(what != "step_no_input_grad")
    if what == "forward_train_grad":
        return lambda: model(x)
    wanted = ([x] if x.requires_grad else []) + list(model.parameters())
    shape = case.shape
    dy = case.normal(shape.out_channels, shape.out_size // 2, x.dtype).to(memory_format=LAYOUTS[layout])
    return lambda: torch.autograd.grad(model(x), wanted, dy)


def _conv_tensors(case, cls):
    conv, shape = case.model.conv_transpose, case.shape
    dy = case.normal(shape.out_channels, shape.out_size, DTYPES[cls])
    return case.x.to(DTYPES[cls]), conv.weight.detach().to(DTYPES[cls]), dy


def _conv(what, case, function, x, w, dy):
    if what.endswith(GENERAL):
        with without_tensor_cores():
            call = _conv(what.removesuffix(GENERAL), case, function, x, w, dy)
        return without_tensor_cores()(call)
    bias = case.model.conv_transpose.bias.detach().to(x.dtype)
    options = {"stride": case.shape.stride, "padding": case.shape.padding}
    if what == "conv_forward":
        return lambda: function(x, w, bias, **options)
    wanted = (x if what == "dgrad" else w).detach().requires_grad_()
    y = function(wanted, w, **options) if what == "dgrad" else function(x, wanted, **options)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)[0]


def _truth_of(case, what, cls, operand=lambda tensor: tensor):
    """The float64 result, and the number of terms that each of its elements sums.

    operand: maps the convolution's operands.
    """
    shape, picked = case.shape, case.picked
    taps = shape.kernel_size**2
    if what.removesuffix(GENERAL) == "wgrad":
        x, w, dy = map(operand, _conv_tensors(case, cls))
        parts = (
            _conv(what, case, F.conv_transpose2d, x_part.double(), w.double(), dy_part.double())()
            for x_part, dy_part in zip(x.split(_CHUNK), dy.split(_CHUNK))
        )
        return sum(parts), case.n * shape.out_size**2
    if what.removesuffix(GENERAL) in ("conv_forward", "dgrad"):
        x, w, dy = map(operand, _conv_tensors(case, cls))
        run = _conv(what, case, F.conv_transpose2d, x[picked].double(), w.double(), dy[picked].double())
        return run(), taps * (shape.in_channels if what.startswith("conv_forward") else shape.out_channels)
    if what == "post_conv_forward":
        model = copy.deepcopy(case.model)
        model.conv_transpose = nn.Identity()
        return _truth(model, case.hidden(cls), True, picked), 0
    if what in FLOAT16:
        return case.float16.truth(True), 0
    training = what != "forward_eval"
    if operand is not tf32_rounded:
        return case.truth(training), 0
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.conv_transpose.weight.copy_(operand(model.conv_transpose.weight))
    return _truth(model, operand(case.x), training, case.picked), 0


def _truth(model, x, training, picked):
    """float64 output of `model` for the picked images. The statistics are those of the whole batch."""
    precise = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        if training:

            def mean(function):
                parts = (function(precise.conv_transpose(part.double())) for part in x.split(_CHUNK))
                return sum(parts) / x.shape[0]

            norm = precise.batch_norm
            center = norm.running_mean = mean(lambda h: h.mean((2, 3)).sum(0))
            norm.running_var = mean(lambda h: (h - center.view(-1, 1, 1)).square().mean((2, 3)).sum(0))
        return precise(x[picked].double())
