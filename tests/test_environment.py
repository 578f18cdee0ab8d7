import json
from pathlib import Path

import pytest
import torch

from cupy_kernels import emulator, source
from cupy_kernels.errors import BackendError
from modelnew import commands, environment


def test_describe_can_be_written_as_json():
    described = json.loads(json.dumps(environment.describe()))
    assert described["digest"] == source.digest()
    assert described["versions"]["torch"] == torch.__version__
    assert len(described["gpus"]) == torch.cuda.device_count()
    assert described["backend"]["name"] in ("cuda", "emulator")
    assert described["backend"]["why"]


def test_no_backend(monkeypatch):
    def none():
        raise BackendError("no compiler at all")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(emulator, "compiler", none)
    backend = environment.backend()
    assert backend["name"] is None
    assert "no compiler at all" in backend["why"]
    assert environment.describe()["emulator"] is None


def test_a_gpu_that_cupy_cannot_use(monkeypatch):
    def unusable():
        raise BackendError("CuPy is not installed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(environment.compiler, "cupy", unusable)
    backend = environment.backend()
    assert backend["name"] == "emulator"
    assert "torch sees a GPU, but CuPy is not installed" in backend["why"]


@pytest.mark.parametrize(
    ("content", "matches"),
    [(json.dumps({"digest": digest}), digest == source.digest()) for digest in (source.digest(), "0" * 64)]
    + [(text, False) for text in ("{}", "[]", "{")],
    ids=["this code", "other code", "no digest", "no record", "no JSON"],
)
def test_records(monkeypatch, tmp_path, content, matches):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "parity_gpu.json").write_text(content)
    assert environment.records() == []  # another project's
    (tmp_path / "cupy_kernels" / "cu").mkdir(parents=True)
    (record,) = environment.records()
    assert record["file"] == "parity_gpu.json"
    assert record["matches"] is matches


def test_where_a_record_goes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cpu = torch.device("cpu")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert commands.record_path("bench", cpu, None) == Path("bench_cpu.json")
    (tmp_path / "cupy_kernels" / "cu").mkdir(parents=True)
    assert commands.record_path("bench", cpu, None) == Path("benchmarks/results/bench_cpu.json")
    assert commands.record_path("bench", cpu, Path("a")) == Path("a/bench_cpu.json")


def test_device(monkeypatch):
    assert environment.device("cpu").type == "cpu"
    for name, message in (("xpu", "received xpu"), ("nowhere", "nowhere")):
        with pytest.raises(ValueError, match=message):
            environment.device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.device().type == "cpu"
    with pytest.raises(BackendError, match="no kernel can run on cuda:1: "):
        environment.device("cuda:1")
    monkeypatch.setattr(environment, "backend", lambda: {"name": "cuda"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert environment.device() == torch.device("cuda")
    assert environment.device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="1 GPUs from cuda:0; received cuda:1"):
        environment.device("cuda:1")


def test_device_without_a_compiler(monkeypatch):
    def none():
        raise BackendError("no compiler at all")

    monkeypatch.setattr(emulator, "compiler", none)
    with pytest.raises(BackendError, match="no compiler at all"):
        environment.device("cpu")


def test_slug(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert environment.slug() == "h100-80gb-hbm3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.slug() == "cpu"
