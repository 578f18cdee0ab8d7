"""Compiled kernels on disk: loaded only as they were written and only where nobody else writes; clear errors."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from threads import in_threads

from cupy_kernels import backend, cache, compiler, emulator, source
from cupy_kernels.errors import BackendError, KernelCompileError
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel

WAY_OUT = "CUPY_KERNELS_CACHE_DIR chooses the folder"
COPY = 'extern "C" __global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }'
RUN = f"""
import numpy as np
from cupy_kernels import source
from cupy_kernels.launch import launch
from cupy_kernels.source import Kernel
x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
with source.override({{"planted.cu": '''{COPY}'''}}):
    launch(Kernel("planted.cu", "copy"), (1, 1, 1), (64, 1, 1), (x, y))
assert (x == y).all()
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty folder for compiled kernels, and nothing loaded but the emulator's runtime."""
    emulator._runtime()
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(emulator, "backend", emulator.Emulator())
    monkeypatch.setattr(compiler, "backend", compiler.Gpu())
    return tmp_path / "cache"


def run_copy(text=COPY):
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    with source.override({"planted.cu": text}):
        launch(Kernel("planted.cu", "copy"), (1, 1, 1), (64, 1, 1), (x, y))
    assert (x == y).all()


def refused(match):
    """The kernel is not to blame, and the message names what is."""
    with pytest.raises(BackendError, match=match) as error:
        run_copy()
    assert "does not compile" not in str(error.value)
    return error.value


@contextlib.contextmanager
def mounted(folder, options):
    """A file system of its own at `folder`."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    folder.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def made(name, content=b"abc" * 1000):
    """Path of the entry, and whether it was made anew."""
    calls = []
    path = cache.entry(name, lambda: calls.append(name) or content)
    return path, bool(calls)


def test_an_entry_is_made_once():
    path, anew = made("a.so")
    assert anew
    assert cache.read(path) == b"abc" * 1000
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert made("a.so") == (path, False)
    assert list(path.parent.iterdir()) == [path]  # nothing half-written


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: whole[:1],
        lambda whole: whole[:1500],
        lambda whole: whole[:-1],
        lambda whole: whole[: -cache.SEAL_BYTES],
        lambda whole: whole + b"\0",
        lambda whole: bytes(len(whole)),
        lambda whole: whole[:700] + b"X" + whole[701:],
    ],
    ids=["empty", "a byte", "half", "short", "unsealed", "long", "zeros", "one byte"],
)
def test_an_entry_that_is_not_as_it_was_written_is_made_anew(damaged):
    path, _ = made("a.so")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    assert made("a.so") == (path, True)
    assert path.read_bytes() == whole


def test_another_entry_in_its_place_is_made_anew():
    path, _ = made("a.so")
    made("b.so")[0].replace(path)
    assert made("a.so") == (path, True)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_an_entry_that_others_can_write_is_made_anew(mode):
    path, _ = made("a.so")
    path.chmod(mode)
    assert made("a.so") == (path, True)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid(), reason="only root gives files away")
def test_what_belongs_to_someone_else_is_not_loaded(folder):
    path, _ = made("a.so")
    os.chown(path, 12345, -1)
    assert made("a.so") == (path, True)
    assert path.stat().st_uid == 0
    os.chown(folder, 12345, -1)
    refused(f"{folder}.*belongs to the user 12345, this process runs as 0.*{WAY_OUT}")


def test_a_folder_of_someone_else(monkeypatch, folder):
    folder.mkdir(mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(f"{folder}.*belongs to the user {owner}, this process runs as {owner + 1}.*{WAY_OUT}")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    refused(f"{folder}, set by CUPY_KERNELS_CACHE_DIR: its mode is drw.*`chmod go-w {folder}`.*{WAY_OUT}")
    folder.chmod(0o755)
    run_copy()


@pytest.mark.parametrize("chosen", ["", "kernels", "./kernels"])
def test_a_folder_that_depends_on_where_one_is(monkeypatch, tmp_path, chosen):
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", chosen)
    monkeypatch.chdir(tmp_path)
    refused(f"'{chosen}', set by CUPY_KERNELS_CACHE_DIR: this is not an absolute path.*{WAY_OUT}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("of_system", [None, "", "relative"])
def test_the_default_is_in_the_home_directory(monkeypatch, tmp_path, of_system):
    monkeypatch.delenv("CUPY_KERNELS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if of_system is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", of_system)
    assert cache.folder() == tmp_path / ".cache" / "cupy_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "cupy_kernels"


def test_no_home_directory(monkeypatch):
    def unknown(user):
        raise KeyError(user)

    for name in ("CUPY_KERNELS_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    error = refused(rf"~/\.cache/cupy_kernels, the default: no home directory is known.*{WAY_OUT}")
    assert error.__suppress_context__


def test_a_read_only_folder(folder):
    folder.mkdir(mode=0o700)
    if os.geteuid():
        folder.chmod(0o500)
        refused(f"{folder}, set by CUPY_KERNELS_CACHE_DIR: .*Permission denied.*{WAY_OUT}")
        return
    with mounted(folder, "ro"):  # permissions do not bind root
        refused(f"{folder}, set by CUPY_KERNELS_CACHE_DIR: .*Read-only file system.*{WAY_OUT}")


def test_a_full_folder(folder):
    with mounted(folder, "size=8k"):
        refused(f"{folder}, set by CUPY_KERNELS_CACHE_DIR: .*No space left on device.*{WAY_OUT}")
        assert list(folder.iterdir()) == []


def test_a_folder_mounted_noexec(folder):
    with mounted(folder, "noexec"):
        refused(f"{folder}, set by CUPY_KERNELS_CACHE_DIR: .*failed to map.*{WAY_OUT}.*noexec")


@pytest.mark.parametrize("kib", [8, 24, 32, 40, 48])
def test_no_room_for_the_compiler(monkeypatch, tmp_path, kib):
    work = tmp_path / "work"
    with mounted(work, f"size={kib}k"):
        monkeypatch.setattr("tempfile.tempdir", str(work))
        monkeypatch.setenv("TMPDIR", str(work))
        refused(r"(?s)No space left on device.*TMPDIR")


def test_a_failed_write_leaves_nothing(monkeypatch, folder):
    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused(f"{folder}.*No space left on device.*{WAY_OUT}")
    assert list(folder.iterdir()) == []
    run_copy()


@pytest.fixture
def fresh_compiler(monkeypatch):
    emulator.compiler.cache_clear()
    yield
    emulator.compiler.cache_clear()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "the C.. compiler false failed.*exit status 1.*CUPY_KERNELS_CXX"),
        ("true", "the C.. compiler true failed.*CUPY_KERNELS_CXX"),
        ("sh -c 'kill -9 $$'", "failed.*SIGKILL.*CUPY_KERNELS_CXX"),
        ('sh -c \'echo text > $(expr "$*" : ".* -o \\([^ ]*\\)")\' -', "invalid ELF header|file too short"),
        ("c++ 'unfinished", "CUPY_KERNELS_CXX=.* is not a command: No closing quotation"),
    ],
    ids=["false", "true", "killed", "garbage", "quotes"],
)
def test_a_compiler_of_no_use(monkeypatch, fresh_compiler, command, message):
    monkeypatch.setenv("CUPY_KERNELS_CXX", command)
    refused(f"(?s){message}")


def test_a_compiler_that_refuses_its_options(monkeypatch, fresh_compiler):
    monkeypatch.setenv("CUPY_KERNELS_CXX", " ".join([*emulator.compiler(), "-no-such-option"]))
    emulator.compiler.cache_clear()
    refused("(?s)-no-such-option failed.*CUPY_KERNELS_CXX")


@pytest.mark.parametrize(
    "statement",
    ["undefined_name;", "nobody_has_it();", 'asm volatile("no.such.instruction");'],
    ids=["compiler", "linker", "assembler"],
)
def test_the_text_is_blamed_for_its_own_errors(statement):
    text = COPY.replace("{", "{ " + statement).replace('extern "C"', 'extern "C" void nobody_has_it();\nextern "C"', 1)
    with pytest.raises(KernelCompileError, match=r"copy \[planted\.cu\] does not compile"):
        run_copy(text)


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", str(2**64)])
def test_a_seed_that_is_none(monkeypatch, seed):
    monkeypatch.setenv("CUPY_KERNELS_SEED", seed)
    refused(f"CUPY_KERNELS_SEED='{seed}' is not an integer from 0")


@pytest.mark.parametrize("kept", [0, 100, 5000, "garbled"])
def test_a_damaged_library_never_reaches_the_loader(folder, kept):
    """In processes of their own: the loader ends one that maps such a file by a signal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", RUN], env=environment, check=True)
    libraries = list(folder.glob("*.so"))
    assert len(libraries) == 2  # the kernel's, and the emulator's runtime
    for library in libraries:
        whole = library.read_bytes()
        library.write_bytes(bytes(b ^ 0x5A for b in whole[:9000]) + whole[9000:] if kept == "garbled" else whole[:kept])
    for _ in range(2):
        subprocess.run([sys.executable, "-c", RUN], env=environment, check=True)
        assert all(map(cache.read, libraries))


def test_threads_compile_a_kernel_once(monkeypatch, folder):
    libraries = 2 + emulator._fills_locals()
    compiled, announced, run = [], [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **options: compiled.append(a) or run(*a, **options))
    monkeypatch.setattr(backend, "_listeners", [announced.append])
    results = [np.zeros(64, np.float32) for _ in range(8)]
    x = np.arange(64, dtype=np.float32)
    with source.override({"planted.cu": COPY}):
        in_threads(lambda i: launch(Kernel("planted.cu", "copy"), (1, 1, 1), (64, 1, 1), (x, results[i])))
    assert all((y == x).all() for y in results)
    assert len(announced) == len(list(folder.glob("*.so"))) == 1
    assert len(compiled) == 2 * libraries  # they are compiled, then linked


def test_threads_write_an_entry_once_and_others_at_the_same_time(folder):
    calls = []
    paths = in_threads(lambda i: cache.entry(f"{i % 2}.so", lambda: calls.append(i) or bytes(10**5)))
    assert sorted(set(paths)) == sorted(folder.iterdir()) == [folder / "0.so", folder / "1.so"]
    assert len(calls) == 2


def test_processes_that_write_the_same_entry_do_not_collide(folder):
    folder.mkdir(mode=0o700)
    paths = in_threads(lambda i: cache._write(folder / "a.so", bytes([i]) * 10**6) or folder / "a.so")
    assert cache.read(paths[0]) in [bytes([i]) * 10**6 for i in range(8)]
    assert list(folder.iterdir()) == [folder / "a.so"]


def test_a_failure_is_not_kept():
    def fail():
        raise OSError("once")

    known = {}
    with pytest.raises(OSError, match="once"):
        cache.once(known, "key", fail)
    assert cache.once(known, "key", lambda: 1) == cache.once(known, "key", fail) == 1


def test_a_fork_during_a_compilation_does_not_wait_for_it():
    began, go_on, known = threading.Event(), threading.Event(), {}
    thread = threading.Thread(target=cache.once, args=(known, "key", lambda: (began.set(), go_on.wait(60))))
    thread.start()
    began.wait(60)
    child = os.fork()
    if not child:
        cache.once(known, "key", lambda: 1)
        os._exit(0)
    waited = threading.Timer(20, os.kill, (child, 9))
    waited.start()
    status = os.waitpid(child, 0)[1]
    waited.cancel()
    go_on.set()
    thread.join()
    assert status == 0
