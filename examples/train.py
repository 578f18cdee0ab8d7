"""Trains a small network with ModelNew inside it on real data: scikit-learn's handwritten digits, 1797 images of 8x8,
upscaled.

    python3 -m pip install ".[cuda11,emulator,examples]"
    python3 examples/train.py --plot loss.png --checkpoint digits.pt

It shows ModelNew as a layer like any other, with an optimizer, train and eval mode, and a state dict: `--reference`
trains the same network with PyTorch's `Model` in its place, from the same parameters, and `--resume` goes on from the
checkpoint as if the run had never ended. On the CPU, ModelNew runs through the emulator; this takes about a minute.
"""

import contextlib
import os
import sys
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from cupy_kernels.backend import on_compile
from cupy_kernels.errors import BackendError
from modelnew import Model, ModelNew, environment

CLASSES = 10
HELD_OUT = 5  # every fifth image
# What a run must share with the one that it resumes.
SETTINGS = ("channels", "size", "images", "batch", "lr", "seed", "amp")
EXTRA = "python3 -m pip install matplotlib scikit-learn"

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def network(channels: int, size: int, reference: bool) -> nn.Sequential:
    """A convolution, ModelNew (or Model), and a linear classifier."""
    middle = (Model if reference else ModelNew)(channels, 2 * channels, 3, 1, 1, 1, 2, device="cpu")
    features = 2 * channels * (size // 2) ** 2
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), middle, nn.Flatten(), nn.Linear(features, CLASSES))


def digits(images: int | None, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, labels), x [N, 1, size, size] in [0, 1], in an order drawn from torch's generator."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise click.UsageError(f"the images come with scikit-learn, which is missing: {EXTRA}") from error
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    chosen = torch.randperm(len(x))[:images]
    return nn.functional.interpolate(x[chosen], (size, size), mode="bilinear"), torch.tensor(data.target)[chosen]


def save(path: Path, state: dict) -> None:
    """Writes the checkpoint, or leaves what was there."""
    unfinished = path.with_name(path.name + ".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load(path: Path, settings: dict) -> dict:
    """The state that `save` wrote. click.UsageError unless it belongs to a run with these settings."""
    if not path.is_file():
        raise click.UsageError(f"--resume: there is no checkpoint {path}; the first run goes without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged files make the unpickler raise whatever their bytes lead to
        state = None
    theirs = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(theirs, dict):
        raise click.UsageError(f"--resume: {path} is not a checkpoint of this program, or it is damaged")
    other = [
        f"--{name} {theirs.get(name)} (now {settings[name]})" for name in SETTINGS if theirs.get(name) != settings[name]
    ]
    if other:
        raise click.UsageError(f"--resume: the checkpoint {path} is of another run, made with {', '.join(other)}")
    return state


def draw(path: Path, losses: list[float], accuracies: list[float], title: str) -> None:
    """Draws the loss of each step and the accuracy after each epoch as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(range(1, len(losses) + 1), losses, color="#c0392b", lw=0.8)
    panel.set(xlabel="step", ylabel="loss (cross entropy)", yscale="log", title=title)
    right = panel.twinx()
    steps = len(losses) // len(accuracies)
    right.plot([steps * (i + 1) for i in range(len(accuracies))], accuracies, "o-", color="#2980b9")
    right.set(ylabel="accuracy on held-out images (dots)", ylim=(0, 1))
    figure.savefig(path, format="png", dpi=110)


@torch.no_grad()
def accuracy(net, x, labels, batch: int) -> float:
    net.eval()
    right = sum((net(a).argmax(1) == b).sum() for a, b in zip(x.split(batch), labels.split(batch)))
    net.train()
    return right.item() / len(x)


def _in_a_folder(_, parameter, path):
    if path and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.absolute().parent}")
    return path


_FILE = {"type": click.Path(dir_okay=False, path_type=Path), "callback": _in_a_folder, "metavar": "FILE"}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--device", help="cuda, cuda:1, ... or cpu, which runs the emulator.  [default: the GPU, if there is one]"
)
@click.option("--epochs", type=click.IntRange(min=1), default=4, help="Epochs in all, resumed ones included.")
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Images in a step.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate of Adam: the more pixels and channels, the smaller.  [default: 1e-4 on a GPU, 3e-3 on the CPU]",
)
@click.option("--seed", default=0, help="Seed of the parameters, the held-out images and their order.")
@click.option("--images", type=click.IntRange(min=HELD_OUT), help="How many images to use.  [default: all]")
@click.option(
    "--channels",
    type=click.IntRange(min=1),
    help="Channels into ModelNew, which puts out twice as many. Tensor cores take multiples of 16; they are slow to "
    "emulate.  [default: 32 on a GPU, 12 on the CPU]",
)
@click.option(
    "--size",
    type=click.IntRange(min=2),
    help="Height and width that the images are scaled to.  [default: 32 on a GPU, 8, as they are, on the CPU]",
)
@click.option("--amp", is_flag=True, help="Under autocast, with a GradScaler: float16, on the CPU bfloat16.")
@click.option("--checkpoint", **_FILE, help="Write the state of the run here after each epoch.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint.")
@click.option("--plot", **_FILE, help="Draw the loss curve here, as PNG.")
@click.option("--reference", is_flag=True, help="Train with PyTorch's Model in place of ModelNew.")
def main(device, epochs, checkpoint, resume, plot, reference, **settings):
    """Train a network with ModelNew inside it on scikit-learn's handwritten digits."""
    try:
        device = environment.device(device)
    except (ValueError, BackendError) as error:
        raise click.BadParameter(str(error), param_hint="--device") from error
    if resume and not checkpoint:
        raise click.UsageError("--resume needs --checkpoint FILE, the file to go on from")
    if checkpoint and checkpoint.exists() and not resume:
        raise click.UsageError(f"{checkpoint} exists: --resume goes on from it; to start again, remove it")
    if plot:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise click.UsageError(f"--plot needs matplotlib: {EXTRA}") from error
    sizes = (
        {"channels": 32, "size": 32, "lr": 1e-4} if device.type == "cuda" else {"channels": 12, "size": 8, "lr": 3e-3}
    )
    settings.update((name, default) for name, default in sizes.items() if settings[name] is None)
    batch = settings["batch"]

    torch.backends.cudnn.deterministic = True
    torch.manual_seed(settings["seed"])
    net = network(settings["channels"], settings["size"], reference).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"])
    scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"])
    autocast = torch.autocast(
        device.type, torch.float16 if device.type == "cuda" else torch.bfloat16, enabled=settings["amp"]
    )
    x, labels = (tensor.to(device) for tensor in digits(settings["images"], settings["size"]))
    held_out = len(x) // HELD_OUT
    losses, accuracies = [], []
    if resume:
        state = load(checkpoint, settings)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        losses, accuracies = state["losses"], state["accuracies"]
        torch.set_rng_state(state["rng"])
        out.print(f"Resumed after epoch {len(accuracies)} of {epochs}.")

    who = "Model (PyTorch)" if reference else "ModelNew"
    pixels = "x".join(map(str, x.shape[2:]))
    out.print(f"{who}, {settings['channels']} channels, on {device}: {len(x) - held_out} images of {pixels}, ", end="")
    out.print(f"{held_out} held out")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=out, transient=True)
    with bar as progress, contextlib.ExitStack() as stack:
        steps = -(-(len(x) - held_out) // batch)
        task = progress.add_task("", total=epochs * steps, completed=len(losses))
        stop = on_compile(lambda kernel: progress.update(task, description=f"compiling {kernel.name}"))
        stack.callback(stop)
        for epoch in range(len(accuracies) + 1, epochs + 1):
            found = []
            for chosen in (held_out + torch.randperm(len(x) - held_out)).split(batch):
                chosen = chosen.to(device)
                with autocast:
                    loss = nn.functional.cross_entropy(net(x[chosen]), labels[chosen])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                found.append(loss.item())
                progress.update(task, advance=1, description=f"epoch {epoch}, loss {found[-1]:.3f}")
            losses += found
            accuracies.append(accuracy(net, x[:held_out], labels[:held_out], batch))
            out.print(f"epoch {epoch}: mean loss {sum(found) / len(found):.4f}, accuracy {accuracies[-1]:.1%}")
            if checkpoint:
                state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
                state["scaler"] = scaler.state_dict()
                save(checkpoint, {**state, "settings": settings, "losses": losses, "accuracies": accuracies})
    if plot:
        draw(plot, losses, accuracies, f"{who} on {device}: accuracy {accuracies[-1]:.1%}")
        out.print(f"Loss curve: {plot}")


if __name__ == "__main__":
    main()
