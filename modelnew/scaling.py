"""`python -m modelnew scaling`: a training step on several GPUs beside one GPU, of ModelNew and of Model.

There is one process for each GPU, each with as many images as a GPU alone (weak scaling). A trial is a few consecutive
steps: forward, and gradients of all parameters. The ways to take a step are timed in turns. With several GPUs, the
slowest one counts.
"""

import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import commands
from .distributed import convert_sync_batchnorm
from .model import BATCH, Model, ModelNew, get_init_inputs
from .numerics import resolve
from .timing import current

TRIALS, STEPS, TINY_BATCH = 10, 10, 2
TINY = (16, 16, 3, 1, 1, 1, 4), (16, 6, 8)  # arguments of the models, and an image
FULL = tuple(get_init_inputs()), (64, 32, 32)
_MOST_APART = 0.05  # rms of both models' gradients of the convolution's weight: TF32 moves some of pooling's winners
# What DistributedDataParallel is given, by the name of the way. The buffers are not parameters: each process has its
# own, or, synchronised, all have the same.
_WAYS = {
    "ddp": {},
    "ddp, own buffers": {"broadcast_buffers": False, "gradient_as_bucket_view": True},
    "ddp, synchronised": {"broadcast_buffers": False, "gradient_as_bucket_view": True},
}

out = commands.console()


def measure(kind: str, count: int, images: int, trials: int, tiny: bool) -> list[dict]:
    """The rows of the record. kind: "cuda" or "cpu". count: number of processes, each with this number of images.

    "alone": one GPU, the others idle. "apart": all at once, without DistributedDataParallel. Then `_WAYS`. Raises
    RuntimeError if a process ends too early, or if the models' gradients do not agree.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        args = (kind, count, images, trials, tiny, folder)
        processes = [context.Process(target=_rank, args=(rank, *args), daemon=True) for rank in range(count)]
        for process in processes:
            process.start()
        try:
            while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
                time.sleep(0.05)
        finally:
            for process in processes:
                process.terminate() if any(p.exitcode for p in processes) else process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a process of the measurement failed, see above")
        return json.loads(Path(folder, "rows").read_text())


def _rank(rank, kind, count, images, trials, tiny, folder):
    gpu = kind == "cuda"
    device = torch.device(kind, rank) if gpu else torch.device(kind)
    if not gpu:
        torch.set_num_threads(1)
    with current(device):
        store = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": count}
        dist.init_process_group("nccl" if gpu else "gloo", **store, device_id=device if gpu else None)
        steps, cls = _steps(rank, device, images, tiny)
        found = {key: [] for key in steps}
        for trial in range(-1, trials):  # the first one warms up
            for (who, what), step in steps.items():
                dist.barrier()
                ms = _time(step, device, _steps_of_trial(tiny)) if what != "alone" or rank == 0 else 0.0
                slowest = torch.tensor(ms, device=device)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                found[who, what] += [slowest.item()] if trial >= 0 else []
        if rank == 0:
            Path(folder, "rows").write_text(json.dumps(_rows(found, cls, count, images)))
        dist.barrier()
        # If DistributedDataParallel had the group's last reference, its destructor would wait, with the GIL, for gloo's
        # thread, which may be waiting for the GIL.
        steps.clear()
        del step
        gc.collect()
        dist.destroy_process_group()


def _steps(rank, device, images, tiny) -> tuple[dict[tuple[str, str], Callable], str]:
    """({(who, what): a function that takes a step}, the class of the convolutions)"""
    arguments, image = TINY if tiny else FULL
    torch.manual_seed(0)
    reference = Model(*arguments, device=device)
    torch.manual_seed(rank)
    x = torch.rand(images, *image).to(device)
    with torch.no_grad():
        dy = torch.randn_like(reference(x))
    found, gradients = {}, {}
    for who, kind in (("modelnew", ModelNew), ("model", Model)):
        for what, options in {"alone": None, "apart": None, **_WAYS}.items():
            synchronised = what.endswith("synchronised")
            if synchronised and kind is Model and device.type == "cpu":
                continue  # torch's needs a GPU
            model = kind(*arguments, device=device)
            model.load_state_dict(reference.state_dict())
            if synchronised:
                model = convert_sync_batchnorm(model)
            called = model if options is None else DistributedDataParallel(model, **options)
            found[who, what] = _step(called, x, dy)
            if what != "alone":
                found[who, what]()
                gradients[who, what] = model.conv_transpose.weight.grad.clone()
    for (who, what), gradient in gradients.items():
        expected = gradients.get(("model", what))
        if who == "modelnew" and expected is not None:
            apart = ((gradient - expected).square().mean() / expected.square().mean()).sqrt().item()
            if not apart <= _MOST_APART:
                raise RuntimeError(f"{what}: the gradients of ModelNew and Model are {apart:.2g} apart on rank {rank}")
    return found, resolve("auto", x.device)


def _step(model, x, dy):
    def step():
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return step


def _steps_of_trial(tiny) -> int:
    return 1 if tiny else STEPS


def _time(step, device, steps) -> float:
    """Milliseconds per step."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start) / steps


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rows(found, cls, count, images) -> list[dict]:
    medians = {key: statistics.median(ms) for key, ms in found.items()}
    rows = []
    for (who, what), ms in found.items():
        alone, median = medians[who, "alone"], medians[who, what]
        row = {"who": who, "what": what, "class": cls, "gpus": 1 if what == "alone" else count, "n": images}
        row |= {"ms": round(median, 4), "ms_min": round(min(ms), 4), "ms_max": round(max(ms), 4)}
        rows.append(row | {"added_ms": round(median - alone, 4), "scaling": round(alone / median, 4)})
    return rows


def show(record: dict) -> None:
    """Prints the rows."""
    table = commands.table(("", ""), ("GPUs", "ms", "range", "added ms", "weak scaling"))
    for row in record["rows"]:
        times = f"{row['ms']:.3f}", f"{row['ms_min']:.3f} to {row['ms_max']:.3f}", f"{row['added_ms']:+.3f}"
        table.add_row(row["who"], row["what"], str(row["gpus"]), *times, f"{row['scaling']:.3f}")
    out.print("\n[bold]Milliseconds of a training step[/]; added, and scaling, beside one GPU alone", highlight=False)
    out.print(table)


@commands.command("scaling", short_help="Time a training step on all GPUs beside one.")
@click.option("--gpus", type=click.IntRange(min=2), help="How many.  [default: all; 2 processes on the CPU]")
@click.option(
    "--images", type=click.IntRange(min=1), help=f"Images of each GPU.  [default: {BATCH}; {TINY_BATCH} with --tiny]"
)
@commands.trials_option(TRIALS)
@click.option("--tiny", is_flag=True, help="Few images and small layers: tries the command, on a CPU, too.")
@commands.device_option("or, with --tiny, cpu, which means the emulator")
@commands.output_option("scaling")
def scaling_command(gpus, images, trials, tiny, device, output):
    """Time a training step with DistributedDataParallel on several GPUs, beside the step on one GPU.

    Measures ModelNew and Model. Every GPU has the same number of images. The gradients of both models are compared
    first. Prints a table and writes a record (JSON).
    """
    device = commands.usable_device(device) if tiny else commands.gpu(device, "scaling without --tiny")
    images = images or (TINY_BATCH if tiny else BATCH)
    count = gpus or (torch.cuda.device_count() if device.type == "cuda" else 2)
    if device.type == "cuda" and not 2 <= count <= (seen := torch.cuda.device_count()):
        raise click.ClickException(f"this takes at least 2 GPUs and at most those that torch sees, {seen}; not {count}")
    try:
        rows = measure(device.type, count, images, trials, tiny)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    with current(device):
        record = {**commands.head(device), "trials": trials, "steps": _steps_of_trial(tiny), "rows": rows}
        show(record)
        if not tiny or output:
            commands.save(record, "scaling", device, output, out)
