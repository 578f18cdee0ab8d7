"""Assertions of the one tolerance policy, see `modelnew.parity.within_policy`."""

import copy
import os

import torch

from modelnew.parity import Row, error, tf32_rounded, within_policy

CLASSES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}

_kept: dict[tuple[str, str], dict] = {}


def keep(row: Row) -> None:
    """Keeps what a test measured on a GPU, for `--record`: of each comparison the worst beside PyTorch's.

    The first line of `row.what` names the comparison.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("/")[2].partition("[")[0].partition(" ")[0]
    keep_records([row._replace(what=f"{test}: {row.what.splitlines()[0]}").record()])


def keep_records(records: list[dict]) -> None:
    """The same for records, such as another process of pytest-xdist kept."""
    for record in records:
        known = _kept.setdefault((record["what"], record["class"]), record)
        if record["rms"] - record["torch_rms"] > known["rms"] - known["torch_rms"]:
            _kept[record["what"], record["class"]] = record


def kept() -> list[dict]:
    """All that is kept."""
    return [_kept[key] for key in sorted(_kept)]


def check(
    actual: torch.Tensor, truth: torch.Tensor, torch_result: torch.Tensor, what: str = "result", terms: int = 0
) -> None:
    """Fails unless `actual` (any dtype) is as close to `truth` (float64) as PyTorch's own result in that dtype is.

    terms: how many terms this result sums, if it is a long sum.
    """
    assert actual.dtype == torch_result.dtype, f"{what}: dtype {actual.dtype}, torch's is {torch_result.dtype}"
    assert actual.shape == torch_result.shape, (
        f"{what}: shape {tuple(actual.shape)}, torch's is {tuple(torch_result.shape)}"
    )
    ours, theirs = error(actual, truth), error(torch_result, truth)
    assert within_policy(actual, truth, ours, theirs, terms), f"{what}: received {ours}, torch has {theirs}"
    if actual.is_cuda:
        keep(Row(what, CLASSES[actual.dtype], ours, theirs, close=None, ok=True))


def torch_result(function, cls: str, *tensors: torch.Tensor) -> torch.Tensor:
    """What PyTorch computes in a class; "tf32", which no CPU has, of operands (not vectors) rounded to it."""
    return function(*(tf32_rounded(t) if cls == "tf32" and t.dim() > 1 else t for t in tensors))


def check_gradients(function, reference, inputs, what: str = "gradient", terms: tuple[int, ...] | None = None) -> None:
    """Compares output and input gradients of `function` with torch's `reference`, at the inputs' dtype and in float64.

    function, reference: callables of the tensors in `inputs`, each returning one tensor. Inputs that require grad get
    one random incoming gradient. Also fails if an input was changed.
    terms: how many terms the output and the gradient of each of `inputs` sum, 0 where no long sum is.
    """
    terms = (0,) * (1 + len(inputs)) if terms is None else terms
    assert len(terms) == 1 + len(inputs), f"{what}: {len(inputs)} inputs and an output, received terms {terms}"

    def run(f, tensors, dtype=None):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None for t in tensors]
        y = f(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        dy = dy.to(dtype or y.dtype).to(y)  # the truth, too, gets a gradient that the results' dtype holds
        grads = torch.autograd.grad(y, wanted, dy) if wanted and y.requires_grad else ()
        for before, after in zip(tensors, leaves):
            if before is not None:
                assert torch.equal(before.nan_to_num(), after.detach().nan_to_num()), f"{what}: an input was changed"
        return [y.detach(), *grads]

    ours = run(function, inputs)
    theirs = run(reference, inputs)
    as_double = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = run(reference, as_double, ours[0].dtype)
    summed = [terms[0], *(n for n, t in zip(terms[1:], inputs) if t is not None and t.requires_grad)]
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        check(a, t, b, f"{what}, output" if i == 0 else f"{what}, gradient {i}", summed[i])


def check_gradient_penalty(theirs: torch.nn.Sequential, ours: torch.nn.Sequential, x: torch.Tensor) -> None:
    """Second derivatives of a chain, those of the square of dx. Not of the convolution's bias: it may have none."""

    def penalty(model):
        model = copy.deepcopy(model)
        leaf = x.to(next(model.parameters()).dtype).requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        wanted = [p for name, p in model.named_parameters() if name != "0.bias"]
        return torch.autograd.grad(dx.square().sum(), wanted)

    truth, reference, found = penalty(copy.deepcopy(theirs).double()), penalty(theirs), penalty(ours)
    for expected, actual, theirs_result in zip(truth, found, reference):
        errors = [float((t.double() - expected).norm() / expected.norm()) for t in (actual, theirs_result)]
        assert errors[0] <= 2 * errors[1] + 1e-6, errors
