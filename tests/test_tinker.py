"""Reading and editing kernels: what is listed, what an edit changes and what it refuses."""

import sys
import threading
import warnings

import pytest
import torch

import cupy_kernels
from cupy_kernels import backend, nvrtc, parsing, source, tinker
from cupy_kernels.errors import BackendError, KernelCompileError
from modelnew import ModelNew
from modelnew.functional import tanh

FORWARD = source.packaged_kernels("tanh.cu")["tanh_forward"]
TWICE = FORWARD.replace("tanh_of(", "2 * tanh_of(")
MODEL = (16, 16, 3, 1, 1, 1, 4)

try:
    NVRTC = nvrtc.version()
except BackendError:
    NVRTC = None


@pytest.fixture(autouse=True)
def nothing_stays_edited():
    yield
    cupy_kernels.reset()


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that were compiled, or loaded from the disk cache."""
    seen = []
    monkeypatch.setattr(backend, "_listeners", [])
    backend.on_compile(seen.append)
    return seen


def test_kernels_are_listed():
    rows = cupy_kernels.kernels()
    assert {row.file for row in rows} == {f for f in source.names() if f.endswith(".cu")}
    assert len({row.name for row in rows}) == len(rows), "a name must say which kernel is meant"
    (row,) = cupy_kernels.kernels("tanh_forward")
    assert row.parameters == "const scalar_t* x, scalar_t* y, i64 size"
    assert (row.file, row.variants, row.macros) == ("tanh.cu", 8, "scalar_t acc_t WIDTH")
    assert row.values[1:] == ("acc_t: float, double", "WIDTH: 1, 4, 2, 8")
    assert [row.name for row in cupy_kernels.kernels("tanh")] == ["tanh_forward", "tanh_backward"]
    assert "tanh_backward" in repr(rows)
    assert "const scalar_t* x" not in repr(rows)
    assert "WIDTH: 1" not in repr(rows)
    assert "const scalar_t* x" in repr(cupy_kernels.kernels("tanh_forward"))
    assert "WIDTH: 1, 4, 2, 8" in repr(cupy_kernels.kernels("tanh_forward"))
    (row,) = cupy_kernels.kernels("pack_weight_fp16")
    assert row.macros == "scalar_t acc_t WGMMA AS_IT_IS SPLIT CHUNK_CHANNELS LINE_BYTES FLIP and 5 of the shape"
    of_header = cupy_kernels.kernels("tanh.cuh")
    assert {row.file for row in of_header} == set(tinker.files_with("tanh.cuh"))
    assert "const scalar_t* x" not in repr(of_header)
    assert "tanh_forward" in rows._repr_mimebundle_()["text/html"]


def test_definitions_are_cut_out_whole():
    for file in source.names():
        text = source.packaged(file)
        found = source.packaged_kernels(file)
        assert len(found) == text.count('extern "C" __global__')
        for definition in found.values():
            assert definition.count('extern "C"') == 1
            assert definition.count("{") == definition.count("}")
            assert definition.endswith("\n}")


def test_show(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    cupy_kernels.show("tanh_backward")
    text = capsys.readouterr().out
    number, line = next(
        (n, s) for n, s in enumerate(source.text("tanh.cu").split("\n"), 1) if "void tanh_backward" in s
    )
    assert text.splitlines()[0].strip().split(maxsplit=1) == [str(number), line]
    assert "tanh_forward" not in text
    cupy_kernels.show("tanh.cuh")
    assert "tanh_slope" in capsys.readouterr().out
    with cupy_kernels.override({"tanh_forward": TWICE}):
        cupy_kernels.show("tanh_forward")
    assert "2 * tanh_of" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tanh_forward", "tanh.cu", "tanh"])
def test_an_override_is_used_at_once_and_nothing_is_compiled_twice(device, name, compiled):
    unique = f"// {name} {device}\n"  # so that no other test has compiled it
    text = unique + (TWICE if name == "tanh_forward" else source.text("tanh.cu").replace("tanh_of(", "2 * tanh_of("))
    model = ModelNew(*MODEL, replace="tanh", device=device)
    x = torch.randn(2, 16, 4, 4, device=device)
    before = model(x)
    known = len(compiled)
    for _ in range(2):
        with cupy_kernels.override({name: text}):
            assert not torch.equal(model(x), before)
            torch.testing.assert_close(tanh(x), 2 * torch.tanh(x))
        assert torch.equal(model(x), before)
    assert len(compiled) == known + 1
    cupy_kernels.edit({name: text})
    assert not torch.equal(model(x), before)
    cupy_kernels.reset(name)
    assert torch.equal(model(x), before)
    assert len(compiled) == known + 1


def test_an_edit_compiles_the_edited_kernel_alone(device, compiled):
    x = torch.ones(8, device=device, requires_grad=True)
    backward = "__device__ float of_this_cell;\n" + source.packaged_kernels("tanh.cu")["tanh_backward"]

    def run(forward):
        tanh(x).backward(x)
        text = source.unit(source.Kernel("tanh.cu", "tanh_forward"))
        assert list(parsing.declarations(text)) == ["tanh_forward"] if forward else ["tanh_forward", "tanh_backward"]
        return [kernel.name for kernel in compiled]

    run(forward=False)
    compiled.clear()
    unique = f"// alone, {device}\n"
    with cupy_kernels.override({"tanh_forward": unique + FORWARD}):
        assert run(forward=True) == ["tanh_forward"]
        # Each cell is on its own: neither a name twice nor the other's errors.
        with cupy_kernels.override({"tanh_backward": unique + backward}):
            assert run(forward=True) == ["tanh_forward", "tanh_backward"]
            with cupy_kernels.override({"tanh_forward": "__device__ float of_this_cell;\n" + FORWARD + unique}):
                assert run(forward=True) == ["tanh_forward", "tanh_backward", "tanh_forward"]
        with source.override({}, {"tanh_backward": {"MINE": 1}}):
            assert run(forward=True)[3:] == ["tanh_backward"]
        assert len(run(forward=True)) == 4
    assert len(run(forward=False)) == 4


def test_an_edited_header_need_not_fit_the_packaged_text_of_an_edited_kernel(device):
    header = source.text("tanh.cuh").replace("tanh_of(", "renamed(")
    x = torch.ones(8, device=device, requires_grad=True)
    with cupy_kernels.override({"tanh.cuh": header, "tanh_forward": FORWARD.replace("tanh_of(", "renamed(")}):
        y = tanh(x)
        y.backward(x)
    assert torch.equal(y, tanh(x))


def test_an_edited_header_reaches_all_that_include_it(device):
    header = source.text("tanh.cuh").replace(": tanh(v)", ": 2 * tanh(v)")
    x = torch.randn(8, device=device)
    with cupy_kernels.override({"tanh.cuh": header}):
        torch.testing.assert_close(tanh(x), 2 * torch.tanh(x))
    assert set(tinker.files_with("tanh.cuh")) >= {"tanh.cu", "batch_norm.cu", "bn_tanh_max_pool.cu"}
    assert tinker.files_with("tanh_forward") == ["tanh.cu"]


def test_edits_of_two_kernels_of_a_file_and_of_the_file(device):
    backward = source.packaged_kernels("tanh.cu")["tanh_backward"].replace("to_acc(gradient", "3 * to_acc(gradient")
    x = torch.zeros(8, device=device, requires_grad=True)

    def slope():
        return torch.autograd.grad(tanh(x).sum(), x)[0][0].item()

    cupy_kernels.edit({"tanh_forward": TWICE})
    cupy_kernels.edit({"tanh_backward": backward})
    assert source.overridden() == {"tanh_forward", "tanh_backward"}
    assert slope() == 3
    assert tanh(x + 1)[0] > 1.5
    cupy_kernels.reset("tanh_backward")
    assert slope() == 1
    assert tanh(x + 1)[0] > 1.5
    cupy_kernels.edit({"tanh.cu": source.packaged("tanh.cu")})  # a file's text ends the edits of its kernels
    assert source.overridden() == {"tanh.cu"}
    assert tanh(x + 1)[0] < 1


def test_blocks_nest_and_end_with_an_error(device):
    x = torch.ones(4, device=device)
    cupy_kernels.edit({"tanh_forward": TWICE})

    def fail():
        with cupy_kernels.override({"tanh_forward": FORWARD, "tanh_backward": {"acc_t": "double"}}):
            assert tanh(x)[0] < 1
            cupy_kernels.edit({"tanh.cu": source.packaged("tanh.cu")})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tanh(x)[0] > 1
    assert source.overridden() == {"tanh_forward"}
    with tinker.unedited():
        assert tanh(x)[0] < 1
    assert tanh(x)[0] > 1


def test_a_constant_of_one_kernel(device, launched, compiled):
    text = "// constants\n" + FORWARD.replace("tanh_of(", "FACTOR * tanh_of(")
    x = torch.randn(8, device=device, requires_grad=True)
    with cupy_kernels.override({"tanh_forward": text}), cupy_kernels.override({"tanh_forward": {"FACTOR": 2}}):
        y = tanh(x)
        torch.testing.assert_close(y, 2 * torch.tanh(x))
        with cupy_kernels.override({"tanh_forward": {"FACTOR": 3, "acc_t": "double"}}):
            torch.testing.assert_close(tanh(x), 3 * torch.tanh(x))
    assert [dict(k.defines).get("FACTOR") for k in compiled] == [2, 3]
    with cupy_kernels.override({"tanh_forward": {"acc_t": "double"}}):
        cupy_kernels.reset("tanh_forward")
        assert not source.overridden()


def test_the_host_s_macros_stay_its_own():
    """WIDTH says how many elements a thread takes: the host's grid is for its own, so the emulator finds a hole."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        edits = cupy_kernels.override({"tanh_forward": {"WIDTH": 1, "acc_t": "double"}})
        with edits, pytest.raises(RuntimeError, match="unwritten"):
            tanh(torch.randn(2048))
        cupy_kernels.edit({"tanh_forward": {"WIDTH": 1}})
        cupy_kernels.edit({"tanh_forward": {"acc_t": "double"}})
    assert [w.filename for w in warned] == [__file__] * 2
    assert all("tanh_forward: the host computes the grid and the memory from its own WIDTH." in str(w) for w in warned)


def test_compile_error_names_the_line_of_the_edited_text(device):
    text = "\n\n" + FORWARD.replace("tanh_of(to_acc(in", "nothing(to_acc(in")
    line = text.partition("nothing(")[0].count("\n") + 1
    with cupy_kernels.override({"tanh_forward": text}), pytest.raises(KernelCompileError) as error:
        tanh(torch.ones(8, device=device))
    second, third = str(error.value).splitlines()[1:3]
    assert second.startswith((f"tanh_forward:{line}:", f"tanh_forward({line})"))
    assert third.strip().startswith(
        f"{line} |         for (int i = 0; i < WIDTH; i++) out.v[i] = from_acc<scalar_t>(nothing("
    )
    if NVRTC and device == "cpu":
        variant = source.Variant("tanh.cu", (("scalar_t", "float"), ("acc_t", "float"), ("WIDTH", 4)))
        with cupy_kernels.override({"tanh_forward": text}), pytest.raises(KernelCompileError) as error:
            nvrtc.compile_variant(variant, "sm_80")
        assert str(error.value).splitlines()[1].startswith(f"tanh_forward({line}): error")
    with cupy_kernels.override({"tanh_forward": {"acc_t": "flaot"}}), pytest.raises(KernelCompileError) as error:
        tanh(torch.ones(8, device=device))
    assert "flaot" in str(error.value).splitlines()[1]
    # What an edited kernel left out keeps the numbers of the file's other lines, before it and behind it.
    file = source.text("tanh.cu").replace("tanh_slope(to_acc(saved", "nothing(to_acc(saved")
    line = next(n for n, s in enumerate(file.splitlines(), 1) if "nothing(" in s)
    x = torch.ones(8, device=device, requires_grad=True)
    for edit in ({"tanh_forward": "\n\n" + FORWARD}, {"tanh_forward": FORWARD, "tanh_backward": {"acc_t": "double"}}):
        with source.override({"tanh.cu": file}), cupy_kernels.override(edit):
            y = tanh(x)
            with pytest.raises(KernelCompileError) as error:
                y.backward(x)
        assert str(error.value).splitlines()[2].strip().startswith(f"{line} |")


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"tanh_forwrad": "x"}, ValueError, r"called 'tanh_forwrad'; did you mean tanh_forward, .*kernels\(\) lists"),
        (
            {"zzz": "x"},
            ValueError,
            r"called 'zzz'; the text of an inline operator is its attribute text; cupy_kernels.kernels",
        ),
        (
            {"tanh_forward": "int x;"},
            ValueError,
            r"lacks the kernel tanh_forward\. It must define\n    extern \"C\" __g",
        ),
        (
            {"tanh.cu": FORWARD},
            ValueError,
            r"lacks the kernel tanh_backward; it has tanh_forward, which is edited by its own name, 'tanh_forward'",
        ),
        (
            {"tanh_forward": FORWARD.replace("tanh_forward", "forward")},
            ValueError,
            r"it has forward\. It must define\n .*void tanh_forward\(const scalar_t\* x, scalar_t\* y, i64 size\)",
        ),
        ({"tanh_forward": source.text("tanh.cu")}, ValueError, r"also defines tanh_backward: edit tanh.cu for several"),
        ({"tanh_forward": FORWARD.replace("i64 size)", "int size)")}, ValueError, r"3 is int size, not i64 size\. The"),
        (
            {"tanh_forward": FORWARD.replace("(const scalar_t*", "(scalar_t*")},
            ValueError,
            r"1 is scalar_t\* x, not const",
        ),
        (
            {"tanh_forward": FORWARD.replace("size)", "size, int n)", 1)},
            ValueError,
            r"declares 4 parameters, not 3\. .*h",
        ),
        ({"tanh_forward": FORWARD[:-1]}, ValueError, r"lacks the closing brace of tanh_forward"),
        ({"tanh_forward": {"WIDHT": 4}}, ValueError, r"no macro 'WIDHT': it has WIDTH, acc_t, scalar_t"),
        ({"tanh.cu": {"WIDTH": 4}}, ValueError, r"changed for a kernel, one of tanh_forward, tanh_backward"),
        ({"tanh_forward": {"acc_t": None}}, TypeError, "the macro acc_t is a str or an int, received None"),
        ({4: "x"}, TypeError, "named by a str, such as 'tanh_forward'; received 4"),
        ({"tanh_forward": 4}, TypeError, r"an edit is a text or \{macro: value\}, received int"),
    ],
)
def test_edits_that_are_refused(edits, error, message):
    for act in (cupy_kernels.edit, lambda edits: cupy_kernels.override(edits).__enter__()):
        with pytest.raises(error, match=message):
            act({"tanh_backward": source.packaged_kernels("tanh.cu")["tanh_backward"], **edits})
        assert not source.overridden()


def test_edits_are_a_dict():
    with pytest.raises(TypeError, match=r"edits are \{name: text\} .*, received str"):
        cupy_kernels.edit("tanh_forward")


def test_threads(device):
    """Others launch while one edits: each result is right by one of the texts, and none is kept for another."""
    x = torch.ones(4, device=device)
    right = {tanh(x)[0].item(), *[2 * tanh(x)[0].item()]}
    found, failed, stop = set(), [], threading.Event()

    def launch():
        while not stop.is_set():
            try:
                found.add(tanh(x)[0].item())
            except Exception as error:
                failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=launch) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with cupy_kernels.override({"tanh_forward": TWICE}):
                assert tanh(x)[0] > 1
            assert tanh(x)[0] < 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not failed
    assert found <= right


def test_a_block_keeps_other_threads_from_editing():
    refused = []

    def edit():
        for act in (cupy_kernels.edit, lambda edits: cupy_kernels.override(edits).__enter__()):
            try:
                act({"tanh_backward": {"acc_t": "double"}})
            except RuntimeError as error:
                refused.append(str(error))

    def in_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    block = cupy_kernels.override({"tanh_forward": TWICE})
    with block:
        in_thread(edit)
        assert len(refused) == 2
        assert "another thread is inside an override block" in refused[0]
        assert source.overridden() == {"tanh_forward"}
    assert not source.overridden()
    # A block that another thread ends, as a garbage collector may, ends all the same.
    block = cupy_kernels.override({"tanh_forward": TWICE})
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    assert not source.overridden()
    in_thread(edit)
    assert len(refused) == 2


def test_reset_of_what_is_not_edited():
    with pytest.raises(ValueError, match="tanh_forward is not edited; edited at present: nothing"):
        cupy_kernels.reset("tanh_forward")


def test_parameters_may_be_renamed_and_spelled_otherwise():
    text = FORWARD.replace("const scalar_t* __restrict__ x", "scalar_t const *x").replace("i64 size)", "i64 size  )", 1)
    with cupy_kernels.override({"tanh_forward": text}):
        torch.testing.assert_close(tanh(torch.ones(4)), torch.ones(4).tanh())


def test_text_and_marks_of_edits():
    original = cupy_kernels.text("tanh_forward")
    assert original == source.packaged_kernels("tanh.cu")["tanh_forward"]
    assert cupy_kernels.text("tanh.cu") == cupy_kernels.text("tanh") == source.packaged("tanh.cu")
    assert not any(row.edited for row in cupy_kernels.kernels("tanh"))
    edit = original.replace("{", "{ // mine", 1)
    with cupy_kernels.override({"tanh_forward": edit, "tanh_backward": {"acc_t": "double"}}):
        assert cupy_kernels.text("tanh_forward") == edit
        assert cupy_kernels.edited() == ["tanh_backward", "tanh_forward"]
        marked = {row.name: row.edited for row in cupy_kernels.kernels() if row.edited}
        assert marked == {"tanh_forward": "tanh_forward", "tanh_backward": "tanh_backward"}
        assert "edited" in repr(cupy_kernels.kernels("tanh"))
    assert cupy_kernels.edited() == []
    assert "edited" not in repr(cupy_kernels.kernels("tanh"))
