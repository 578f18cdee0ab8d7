import importlib.util
import os
import re
from pathlib import Path

import invoked
import pytest
import torch

from cupy_kernels import emulator
from cupy_kernels.errors import BackendError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ("--images", "60", "--batch", "12", "--epochs", "1")


@pytest.fixture(scope="module")
def train():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("train", EXAMPLES / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(module, *arguments):
    return invoked.invoke(module.main, *arguments, spaces=r"[\s│]+")


def losses(path):
    return torch.load(path, weights_only=True)["losses"]


def test_train_like_the_reference(train, device, tmp_path):
    pytest.importorskip("matplotlib")
    ours, theirs, plot = tmp_path / "ours.pt", tmp_path / "theirs.pt", tmp_path / "loss.png"
    common = (*SMALL, "--epochs", 2, "--size", 8, "--device", device)
    code, text = invoke(train, *common, "--checkpoint", ours, "--plot", plot)
    assert code == 0, text
    assert "48 images of 8x8, 12 held out" in text
    assert re.search(r"epoch 2: mean loss \d\.\d+, accuracy \d+\.\d%", text)
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, text = invoke(train, *common, "--checkpoint", theirs, "--reference")
    assert code == 0, text
    assert "PyTorch" in text
    assert len(losses(ours)) == 8
    assert sum(losses(ours)[4:]) < sum(losses(ours)[:4])
    torch.testing.assert_close(losses(ours)[:4], losses(theirs)[:4], rtol=1e-3, atol=1e-4)


def test_train_resumes_as_if_never_ended(train, device, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    common = (*SMALL, "--seed", 5, "--device", device)
    assert invoke(train, *common, "--epochs", 2, "--checkpoint", whole)[0] == 0
    assert invoke(train, *common, "--epochs", 1, "--checkpoint", parts)[0] == 0
    code, text = invoke(train, *common, "--epochs", 2, "--checkpoint", parts, "--resume")
    assert code == 0, text
    assert "Resumed after epoch 1 of 2." in text
    assert losses(parts) == losses(whole)
    ends = [torch.load(path, map_location="cpu", weights_only=True) for path in (whole, parts)]
    torch.testing.assert_close(*(end["model"] for end in ends), rtol=0, atol=0)
    assert ends[0]["accuracies"] == ends[1]["accuracies"]
    assert sorted(os.listdir(tmp_path)) == ["parts.pt", "whole.pt"]


def test_train_under_autocast(train, device, tmp_path):
    """Like the reference, and resumed with the scale that it ended with."""
    paths = [tmp_path / f"{name}.pt" for name in ("ours", "theirs")]
    for path, more in zip(paths, ([], ["--reference"])):
        common = (*SMALL, "--amp", "--device", device, "--checkpoint", path, *more)
        assert invoke(train, *common)[0] == 0
        code, text = invoke(train, *common, "--epochs", 2, "--resume")
        assert (code, "Resumed after epoch 1 of 2." in text) == (0, True)
    ours, theirs = map(losses, paths)
    assert ours != theirs
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=2e-2, atol=1e-2)  # later, roundings have grown
    scalers = [torch.load(path, weights_only=True)["scaler"] for path in paths]
    assert scalers[0]["scale"] >= scalers[1]["scale"]  # which PyTorch's gradients may overflow, and ours not
    assert scalers[0]["_growth_tracker"] > 0


def test_train_refuses_a_checkpoint_that_is_none_or_anothers(train, tmp_path):
    path = tmp_path / "a.pt"
    common = (*SMALL, "--device", "cpu", "--reference", "--checkpoint", path)
    code, text = invoke(train, *common, "--resume")
    assert (code, path.exists()) == (2, False)
    assert "there is no checkpoint" in text

    assert invoke(train, *common)[0] == 0
    before = path.read_bytes()
    code, text = invoke(train, *common, "--resume", "--channels", 4)
    assert code == 2
    assert "made with --channels 12 (now 4)" in text
    code, text = invoke(train, *common, "--resume", "--size", 10)
    assert code == 2
    assert "made with --size 8 (now 10)" in text
    code, text = invoke(train, *common)
    assert code == 2
    assert "--resume goes on from it" in text
    assert path.read_bytes() == before

    torch.save([1, 2], path)
    for content in (path.read_bytes(), before[:1000], b"", b"text"):
        path.write_bytes(content)
        code, text = invoke(train, *common, "--resume")
        assert code == 2
        assert "is not a checkpoint" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --checkpoint FILE"),
        (["--plot", "/nowhere/loss.png"], "there is no folder /nowhere"),
        (["--device", "xpu"], "received xpu"),
        (["--device", "tpu"], "or on cpu by emulation; received tpu"),
        (["--epochs", "0"], "0 is not in the range"),
        (["--lr", "0"], "0.0 is not in the range"),
    ],
)
def test_train_bad_options(train, arguments, message):
    code, text = invoke(train, *arguments)
    assert code == 2
    assert message in text


def test_train_without_a_device(train, monkeypatch):
    def none():
        raise BackendError("no compiler here")

    monkeypatch.setattr(emulator, "compiler", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (((), "no compiler here"), (("--device", "cuda"), "no kernel can run on cuda")):
        code, text = invoke(train, *arguments)
        assert code == 2
        assert message in text
