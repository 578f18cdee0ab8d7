"""Runs KernelBench's own evaluation of examples/kernelbench_submission.py, and compares gradients, which it does not.

KernelBench (https://github.com/ScalingIntelligence/KernelBench) is not part of this project. Clone it, and name the
clone: python3 -m tools.kernelbench_eval ../KernelBench
"""

import concurrent.futures
import functools
import multiprocessing
import shlex
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import click
import torch

from modelnew import commands
from modelnew.timing import current

from .generated import EXAMPLES

SUBMISSION = EXAMPLES / "kernelbench_submission.py"
PROBLEM = "KernelBench/level2/11_ConvTranspose2d_BatchNorm_Tanh_MaxPool_GroupNorm.py"
# KernelBench imports them for its language models and downloads; its evaluation does without.
UNUSED = ("openai", "litellm", "dotenv", "requests", "tqdm")
CORRECTNESS_TRIALS, TIMED_TRIALS = 5, 100

out = commands.console()


@functools.cache
def kernelbench(clone: Path) -> types.SimpleNamespace:
    """KernelBench's modules for evaluation and for its static checks."""
    sys.path.insert(0, str(clone / "src"))
    for name in UNUSED:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    from kernelbench import eval as evaluation
    from kernelbench import kernel_static_checker as checker

    return types.SimpleNamespace(evaluation=evaluation, checker=checker)


def static_errors(clone: Path) -> list[str]:
    """What KernelBench's static checks find in the submission: errors alone, by its defaults for CUDA and float32."""
    return kernelbench(clone).checker.validate_kernel_static(SUBMISSION.read_text(), "cuda", "fp32")[1]


def evaluated(clone: Path) -> dict:
    """A row: whether the submission is right for KernelBench, and milliseconds of a forward, the submission's and the
    reference's: means of its default timing, CUDA events around each call with a cold L2 cache."""
    found = kernelbench(clone).evaluation.eval_kernel_against_ref(
        (clone / PROBLEM).read_text(),
        SUBMISSION.read_text(),
        num_correct_trials=CORRECTNESS_TRIALS,
        num_perf_trials=TIMED_TRIALS,
        measure_performance=True,
        device=torch.device("cuda:0"),
    )
    return {
        "correct": found.correctness,
        "ms": round(found.runtime, 4),
        "reference_ms": round(found.ref_runtime, 4),
        "speedup": round(found.ref_runtime / found.runtime, 2),
    }


def gradient_errors(clone: Path) -> dict[str, list[float]]:
    """{name of an input or parameter: [error of the submission's gradient, of the reference's]}

    At the problem's size. An error is the norm of the difference from the float64 reference over that one's norm. The
    convolution's bias is left out: the batch norm behind it makes its true gradient zero.
    """
    scopes = [{}, {}]
    for scope, path in zip(scopes, (SUBMISSION, clone / PROBLEM)):
        exec(compile(path.read_text(), path.name, "exec"), scope)
    torch.manual_seed(42)
    (x,) = (x.cuda() for x in scopes[1]["get_inputs"]())
    models = []
    for make, dtype in ((scopes[0]["ModelNew"], None), (scopes[1]["Model"], None), (scopes[1]["Model"], torch.float64)):
        torch.manual_seed(42)
        models.append(make(*scopes[1]["get_init_inputs"]()).cuda().to(dtype))
    gradient, found = None, []
    for model in models:
        dtype = next(model.parameters()).dtype
        given = x.detach().to(dtype, copy=True).requires_grad_()
        y = model(given)
        gradient = torch.randn_like(y) if gradient is None else gradient
        y.backward(gradient.to(dtype))
        found.append({"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}})
        del y
    *judged, truth = found
    del truth["conv_transpose.bias"]
    return {
        name: [float((each[name] - right).norm() / right.norm()) for each in judged] for name, right in truth.items()
    }


@commands.command()
@click.argument("clone", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--processes", type=click.IntRange(min=1), default=3, show_default=True, help="Evaluations, one in each.")
@commands.output_option("kernelbench")
def command(clone, processes, output):
    """Evaluate examples/kernelbench_submission.py with KernelBench's own code, which is in the folder CLONE.

    The reference runs with PyTorch's default settings, which allow TF32 in convolutions. Writes a record (JSON).
    Needs a GPU, and Python's package pydantic.
    """
    if not (clone / PROBLEM).is_file():
        raise click.BadParameter(f"{clone} is no clone of KernelBench: it has no {PROBLEM}", param_hint="CLONE")
    device = commands.gpu(None, "KernelBench's evaluation")
    context, rows = multiprocessing.get_context("spawn"), []
    for _ in range(processes):  # one after the other
        with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
            rows.append(executor.submit(evaluated, clone).result())
        out.print(rows[-1])
    with current(device):
        record = {
            **commands.head(device),
            "command": shlex.join(["python3", "-m", "tools.kernelbench_eval", *sys.argv[1:]]),
            "commit": subprocess.run(
                ["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "trials": TIMED_TRIALS,
            "static_errors": static_errors(clone),
            "gradient_errors": gradient_errors(clone),
            "rows": rows,
        }
        commands.save(record, "kernelbench", device, output, out)


if __name__ == "__main__":
    command()
