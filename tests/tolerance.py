"""The one tolerance policy: no worse than PyTorch's own error against float64, at most 1.1 times, plus rounding.

The rounding term covers samples too small for a ratio of two errors to mean anything: one unit in the last place of the
result's dtype, relative to the truth's rms, for the rms error; four, relative to the truth's largest value, for the
largest error. float64 results are compared with a truth of their own precision: 16 times that. Where a result is a long
sum, `terms` adds what n terms added one by one in the accumulator's dtype lose, half a unit times sqrt(n / 6), twice over.
"""

import torch

from modelnew.interop import accumulator_dtype
from modelnew.parity import error

RATIO = 1.1


def check(
    actual: torch.Tensor, truth: torch.Tensor, torch_result: torch.Tensor, what: str = "result", terms: int = 0
) -> None:
    """Fails unless `actual` (any dtype) is as close to `truth` (float64) as PyTorch's own result in that dtype is."""
    assert actual.dtype == torch_result.dtype, f"{what}: dtype {actual.dtype}, torch's is {torch_result.dtype}"
    assert actual.shape == torch_result.shape, (
        f"{what}: shape {tuple(actual.shape)}, torch's is {tuple(torch_result.shape)}"
    )
    ours, theirs = error(actual, truth), error(torch_result, truth)
    finite = truth[truth.isfinite()].abs()
    if not finite.numel():
        finite = truth.new_zeros(1)
    peak = (finite.max() / (finite.square().mean().sqrt() or 1)).item()
    eps = torch.finfo(actual.dtype).eps * (16 if actual.dtype == torch.float64 else 1)
    eps += torch.finfo(accumulator_dtype(actual)).eps * (terms / 6) ** 0.5
    assert ours.rms <= RATIO * theirs.rms + eps, f"{what}: rms error {ours.rms:.3e}, torch {theirs.rms:.3e}"
    assert ours.max <= RATIO * theirs.max + 4 * eps * peak, f"{what}: max error {ours.max:.3e}, torch {theirs.max:.3e}"


def check_gradients(function, reference, inputs, what: str = "gradient", terms: int = 0) -> None:
    """Compares output and input gradients of `function` with torch's `reference`, at the inputs' dtype and in float64.

    function, reference: callables of the tensors in `inputs`, each returning one tensor. Inputs that require grad get
    one random incoming gradient. Also fails if an input was changed.
    """

    def run(f, tensors, seed_grad):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) if t is not None else None for t in tensors]
        y = f(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(y, wanted, dy.to(seed_grad.device, y.dtype)) if wanted and y.requires_grad else ()
        for before, after in zip(tensors, leaves):
            if before is not None:
                assert torch.equal(before.nan_to_num(), after.detach().nan_to_num()), f"{what}: an input was changed"
        return [y.detach(), *grads]

    first = next(t for t in inputs if t is not None)
    ours = run(function, inputs, first)
    theirs = run(reference, inputs, first)
    as_double = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    truth = run(reference, as_double, first)
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        check(a, t, b, f"{what}, output" if i == 0 else f"{what}, gradient {i}", terms)
