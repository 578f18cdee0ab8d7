"""`python -m modelnew training`: judges training steps of `ModelNew`, and draws loss curves; see `training_steps`."""

import click

from . import commands, training_steps
from .model import CHANNELS, HEIGHT
from .parity import RATIO
from .timing import current
from .training_steps import LAST, Settings, judge, judged, rises, train, worst

out = commands.console()


def _record(settings, seeds, device, curves, judgements):
    rows = [
        {
            **dict(zip(("who", "class", "layout"), run)),
            "loss_last": float(f"{losses[-LAST:].mean():.6g}"),
            "losses": [float(f"{loss:.9g}") for loss in losses],
        }
        for run, losses in curves.items()
    ]
    found = [{**j.row.record(), "seed": j.seed, "step": j.step, "ok": j.row.ok} for j in judgements]
    judged = {"seeds": seeds, "judged": training_steps.JUDGED, "judgements": found, "last": LAST}
    return {**commands.head(device), **settings._asdict(), **judged, "rows": rows}


def _show(settings, seeds, curves, judgements):
    title = f"Each of the first {training_steps.JUDGED} steps, {seeds} seed{'s'[: seeds != 1]}"
    out.print(f"\n[bold]{title}[/]: how far from a float64 run, relative, rms", highlight=False)
    table = commands.table(("", "class"), ("ModelNew", "Model", "ratio", "seed", "step", ""))
    for seed, step, row in judgements:
        errors = (f"{row.ours.rms:.2e}", f"{row.torch.rms:.2e}", f"{row.ratio:.2f}")
        table.add_row(row.what, row.cls, *errors, str(seed), str(step), "[green]ok[/]" if row.ok else "[red]FAIL[/]")
    out.print(table)
    out.print(
        f"The worst of all steps and seeds. ok: all are at most {RATIO} times as far as Model in the same class, in "
        "rms and in the largest difference, plus what rounding and chance explain.",
        highlight=False,
    )
    last = min(LAST, settings.steps)
    title = f"Loss over {settings.steps} steps[/], batches of {settings.batch}, seed {settings.seed}"
    out.print(f"\n[bold]{title}; a demonstration", highlight=False)
    table = commands.table(("", "class", "layout"), ("first step", "last step", f"mean of the last {last}"))
    for run, losses in curves.items():
        table.add_row(*run, *(f"{loss:.6f}" for loss in (losses[0], losses[-1], losses[-last:].mean())))
    out.print(table)
    for cls in rises(curves):
        out.print(f"[red]FAIL[/]: Model's loss falls in class {cls}, ModelNew's does not.", highlight=False)


@commands.command("training", short_help="Train beside PyTorch's Model, and compare.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each loss curve.  [default: 300; 10 on the CPU]")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Images per step. For fewer than 64, cuDNN does not use TF32.  [default: 128; on the CPU 4, with --amp 12, "
    "because the largest error of few pixels depends on chance]",
)
@click.option(
    "--channels",
    type=click.IntRange(min=4),
    help="Channels of the images, a multiple of 4. The output has twice as many. Tensor cores need a multiple of "
    f"16.  [default: {CHANNELS}; 16 on the CPU]",
)
@click.option(
    "--size", type=click.IntRange(min=1), help=f"Height and width of an image.  [default: {HEIGHT}; 6 on the CPU]"
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.3,
    show_default=True,
    help="Learning rate.",
)
@click.option("--amp", is_flag=True, help="Train under autocast, in float16 and bfloat16, with a GradScaler.")
@click.option(
    "--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9, show_default=True, help="Momentum of SGD."
)
@commands.seed_option("batches and parameters; plus 1, of the teacher")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Number of seeds for which the first steps are judged: --seed and every second one after it.  "
    "[default: 5; 1 on the CPU]",
)
@commands.device_option()
@commands.output_option("training", "training_amp", drawn=True)
def training_command(device, output, steps, batch, channels, size, lr, amp, momentum, seed, seeds):
    """Judge the first steps of training, and draw loss curves of Model and ModelNew.

    Both models learn to reproduce the output of another Model. They start from the same parameters and get the same
    batches, with TF32 and in float32, or with --amp under autocast. After each of the first 5 steps, ModelNew's output,
    parameters and running statistics must be as close to a float64 run as those of Model in the same numeric class. All
    runs begin each step with the same state, and every seed must pass. The loss curves are a demonstration: ModelNew's
    loss must only fall where Model's does. A CPU has no TF32: there, Model's operands are rounded to TF32, and ModelNew
    runs in the emulator. Prints tables and writes a record (JSON). With matplotlib installed, it
    also draws loss curves (PNG). The exit code is 1 if ModelNew fails.
    """
    if channels and channels % 4:
        raise click.BadParameter(f"must be a multiple of 4, received {channels}", param_hint="--channels")
    device = commands.usable_device(device)
    cpu = device.type == "cpu"
    shape = (channels or (16 if cpu else CHANNELS), size or (6 if cpu else HEIGHT))
    batch = batch or ((12 if amp else 4) if cpu else 128)
    settings = Settings(steps or (10 if cpu else 300), batch, *shape, lr, momentum, seed, amp)
    seeds = seeds or (1 if cpu else 5)
    work = seeds * training_steps.JUDGED * len(judged(settings)) + len(settings.runs) * settings.steps
    try:
        with current(device), commands.progress(work, completed=-1) as update:

            def describe(run):
                update(advance=1, description=" ".join(run))

            starts = [settings._replace(seed=seed + 2 * i) for i in range(seeds)]
            judgements = worst([judgement for start in starts for judgement in judge(start, device, describe)])
            curves = dict(train(settings, device, describe))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _show(settings, seeds, curves, judgements)
    if cpu and not amp:
        out.print("On the CPU: TF32 by rounding Model's operands; ModelNew in the emulator.")
    kind = "training_amp" if amp else "training"
    with current(device):
        commands.publish(_record(settings, seeds, device, curves, judgements), kind, device, output, out)
    if rises(curves) or not all(judgement.row.ok for judgement in judgements):
        raise click.exceptions.Exit(1)
