"""PyTorch's own samples of its modules and operators (torch.testing._internal), ours beside PyTorch's.

Only leaky_relu's samples with inplace=True are refused.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerance import check
from torch import nn

from modelnew import definitions, functional, layers

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# torch's name: (our function, every which sample is taken).
FUNCTIONS = {
    "nn.functional.batch_norm": (functional.batch_norm, 1),
    "nn.functional.conv_transpose2d": (functional.conv_transpose2d, 1),
    "nn.functional.group_norm": (functional.group_norm, 1),
    "nn.functional.leaky_relu": (functional.leaky_relu, 1),
    "nn.functional.max_pool2d": (functional.max_pool2d, 13),
    "tanh": (functional.tanh, 1),
}


@functools.cache
def infos():
    """{name: what torch knows of a function or module}. Its import takes seconds, and would freeze torch's flags."""
    pytest.importorskip("expecttest")  # which torch.testing._internal imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in (*op_db, *module_db) if not getattr(info, "variant_test_name", "")}


def moved(value, *to):
    """A sample's tensors on a device or in another dtype, those in tuples, lists and dicts, too."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(*to).requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(moved(v, *to) for v in value)
    return {k: moved(v, *to) for k, v in value.items()} if isinstance(value, dict) else value


def results(dtype, function, args, options, module=None):
    """Output and what comes with it, every gradient, and a module's buffers. dtype: whose values the gradient has."""
    values = [*args, *options.values()]
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in values]
    found = function(*leaves[: len(args)], **dict(zip(options, leaves[len(args) :])))
    y, *others = found if isinstance(found, tuple) else (found,)
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    wanted += module.parameters() if module else []
    found = [y.detach(), *others, *(t for t in leaves if isinstance(t, torch.Tensor) and not t.requires_grad)]
    if wanted and y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y)
        found += torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True)
    return found + list(module.buffers() if module else ())


def compare(dtype, name, sample, ours, theirs, truth, left_out=None):
    """Each: (function, args, options, module). The truth of norms is by their definitions.

    left_out: the result with this number is not compared.
    """
    ours, theirs = results(dtype, *ours), results(dtype, *theirs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "batch_norm", definitions.batch_norm)
        patch.setattr(F, "group_norm", definitions.group_norm)
        truth = results(dtype, *truth)
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        what = f"{name}, result {i}\n{sample}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"{what}: received {a}, torch has {b}"
        elif i != left_out:
            check(a, t, b, what, terms=t.numel() and 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", layers.__all__)
def test_modules(device, name, dtype):
    info = infos()[f"nn.{name}"]
    for training in (True, False):
        for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
            made, given = sample.constructor_input, moved(sample.forward_input.args, device)
            theirs = getattr(nn, name)(*made.args, **made.kwargs).to(device, dtype).train(training)
            ours = getattr(layers, name)(*made.args, **made.kwargs).to(device, dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            truth = copy.deepcopy(theirs).double()
            if getattr(ours, "inplace", False):
                with pytest.raises(ValueError, match="inplace=True"):
                    ours(*given)
                continue
            runs = ((ours, given), (theirs, given), (truth, moved(given, torch.float64)))
            what = f"{made.args} {made.kwargs} {sample.desc}"
            compare(dtype, name, what, *((module, x, {}, module) for module, x in runs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(device, name, dtype):
    (ours, step), theirs = FUNCTIONS[name], theirs_of(name)
    for sample in itertools.islice(infos()[name].sample_inputs("cpu", dtype, requires_grad=True), 0, None, step):
        given, options = moved((sample.input, *sample.args), device), moved(sample.kwargs, device)
        if options.get("inplace"):
            with pytest.raises(ValueError, match="inplace=True"):
                ours(*given, **options)
            continue
        what = f"{[getattr(t, 'shape', t) for t in given]} {sample.kwargs}"
        runs = ((ours, given, options), (theirs, given, options), (theirs, *moved((given, options), torch.float64)))
        # In training, the gradient of two values of a channel is what is left of terms 10^5 times as large.
        two = options.get("training") and tuple(given[0].shape) == (2, 1)
        compare(dtype, name, what, *runs, left_out=3 if two else None)


def theirs_of(name):
    """torch's function; a norm's as it is at the call."""
    return (
        torch.tanh if name == "tanh" else lambda *args, **options: getattr(F, name.rpartition(".")[2])(*args, **options)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_torch_refuses_is_refused(device, name):
    for sample in infos()[name].error_inputs(torch.device(device)) if infos()[name].error_inputs_func else ():
        call = sample.sample_input
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            FUNCTIONS[name][0](call.input, *call.args, **call.kwargs)
