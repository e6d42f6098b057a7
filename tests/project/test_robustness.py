"""What may go wrong around a call: threads, processes, disks, caches, copies, interruptions.

Run as a program it saves the layers for `test_saved_by_another_torch`:
`python tests/test_robustness.py tests/data/saved_by_torch_X.Y.pt`.
"""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, backends, functional
from dcnv4.backends import folders
from dcnv4.backends.cpu import compile as cpp
from dcnv4.backends.cuda import compile as nvrtc

DATA = Path(__file__).parents[1] / "data"
SECONDS = 240
"""After which a process has hung, also on a busy machine."""
CPU = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
EVERY_CPU_BACKEND = pytest.mark.parametrize("name", ["cpu", "reference"])
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason=f"needs Linux; got {sys.platform}"
)


def require(name: str) -> None:
    reason = backends.why_not(name, CPU)
    if reason is not None:
        pytest.skip(f"the {name} backend {reason}")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script in a process that does not outlive the test."""
    started = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {key: text for key, text in os.environ.items() if not key.startswith("DCNV4_")}
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            env={**kept, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def printed(process: subprocess.Popen[str], timeout: float = SECONDS) -> list[str]:
    """The words that a process prints, which must end well."""
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return output.split()


# Threads.


def conv_results(backend: str, size: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    value = torch.randn(1, size, size, 32, generator=generator)
    offset_mask = torch.randn(1, size, size, 54, generator=generator)
    inputs = [t.to(device).requires_grad_() for t in (value, offset_mask)]
    output = functional.deform_conv(*inputs, groups=2, backend=backend)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def attn_results(backend: str, size: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    value = torch.randn(1, size * size, 2, 16, generator=generator)
    locations = torch.rand(1, 30, 2, 1, 4, 2, generator=generator)
    weights = torch.randn(1, 30, 2, 1, 4, generator=generator)
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    output = functional.ms_deform_attn(
        inputs[0], [(size, size)], *inputs[1:], softmax=True, backend=backend
    )
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns to threads that begin at the same moment."""
    gate = threading.Barrier(count, timeout=SECONDS)

    def wait_and_work(index: int) -> Any:
        gate.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_work, range(count), timeout=SECONDS))


@EVERY_CPU_BACKEND
def test_many_threads(name: str) -> None:
    """Forward and backward of both operators, some threads on the same shapes, some not."""
    require(name)
    jobs = [(run, size) for run in (conv_results, attn_results) for size in (7, 16, 16, 33)]
    expected = [run(name, size) for run, size in jobs]

    def work(index: int) -> list[list[Tensor]]:
        run, size = jobs[index]
        return [run(name, size) for _ in range(10)]

    for right, repeated in zip(expected, in_threads(len(jobs), work), strict=True):
        for results in repeated:
            for one, other in zip(results, right, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_many_threads_on_streams_of_their_own(name: str) -> None:
    reason = backends.why_not(name, CPU._replace(device=torch.device("cuda")))
    if reason is not None:
        pytest.skip(f"the {name} backend {reason}")
    jobs = [(run, size) for run in (conv_results, attn_results) for size in (7, 16, 16, 33)]
    expected = [run("reference", size) for run, size in jobs]

    def work(index: int) -> list[list[Tensor]]:
        run, size = jobs[index]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [run(name, size, "cuda") for _ in range(20)]
            stream.synchronize()
        return [[tensor.cpu() for tensor in tensors] for tensors in results]

    for right, repeated in zip(expected, in_threads(len(jobs), work), strict=True):
        for results in repeated:
            for one, other in zip(results, right, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


FIRST_CALLS = """
    import threading, torch
    from dcnv4 import DCNv4
    layer, x = DCNv4(8, group=2, backend="cpu"), torch.randn(1, 16, 8)
    gate, results = threading.Barrier(8), []

    def work():
        gate.wait()
        output = layer(x)
        (grad,) = torch.autograd.grad(output.sum(), layer.value_proj.weight)
        results.append((output.detach(), grad))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(results) == 8
    assert all(torch.allclose(a, b) for r in results for a, b in zip(r, results[0]))
    print("fine")
"""


def test_the_first_calls_of_many_threads(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Which compile the kernels, once."""
    require("cpu")
    assert printed(start(FIRST_CALLS, DCNV4_CACHE_DIR=str(tmp_path))) == ["fine"]
    assert len(list(tmp_path.glob("*.so"))) == 1


# Processes and caches.

# A kernel of our own keeps this test apart from what the kernels are. The last argument says
# whether it may be compiled.
FILL = """
    import sys, time
    from pathlib import Path
    import torch
    from dcnv4 import DCNv4, backends
    from dcnv4.backends.cuda import compile as nvrtc
    begin, with_nvrtc, may_compile = sys.argv[1:]
    while not Path(begin).exists():
        time.sleep(0.01)
    call = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
    print(backends.why_not("cpu", call))
    if with_nvrtc == "yes":
        if may_compile == "no":
            nvrtc.compile = None
        code = nvrtc.cached("zeros", (("MAX_THREADS", "256"),), "sm_90")
        print(code[:4] == b"\\x7fELF")
    layer, x = DCNv4(8, group=2), torch.ones(1, 16, 8)
    reference = DCNv4(8, group=2, backend="reference")
    reference.load_state_dict(layer.state_dict())
    print(torch.allclose(layer(x), reference(x), atol=1e-6))
"""


def has_nvrtc() -> bool:
    try:
        nvrtc._nvrtc_version()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_processes_fill_one_cold_cache(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, count: int
) -> None:
    """The C++ and, where NVRTC is, the CUDA cache; one more process compiles nothing."""
    require("cpu")
    with_nvrtc = has_nvrtc()
    cache, begin = tmp_path / "cache", tmp_path / "begin"
    arguments = str(begin), "yes" if with_nvrtc else "no"
    environment = {"DCNV4_CACHE_DIR": str(cache)}
    expected = ["None", *(["True"] if with_nvrtc else []), "True"]
    processes = [start(FILL, *arguments, "yes", **environment) for _ in range(count)]
    time.sleep(3)  # most have imported PyTorch by now
    begin.touch()
    for process in processes:
        assert printed(process) == expected
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".so"]) == 1
    assert len([path for path in files if path.parent.name == "cuda"]) == with_nvrtc
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name != "cuda"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert printed(start(FILL, *arguments, "no", **environment)) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


# No file may grow beyond so many bytes: as on a disk that is full.
FULL = """
    import resource, sys, torch
    from dcnv4 import DCNv4, backends
    if sys.argv[1] == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    call = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
    print(backends.choose(*call), DCNv4(8, group=2)(torch.ones(1, 16, 8)).isfinite().all().item())
    print((backends.why_not("cpu", call) or "None").split()[0])
"""


@linux
def test_a_full_disk(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """The reference serves; nothing is left that a later process would trip over."""
    require("cpu")
    environment = {"DCNV4_CACHE_DIR": str(tmp_path)}
    assert printed(start(FULL, "full", **environment)) == ["reference", "True", "needs"]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert printed(start(FULL, "room", **environment)) == ["cpu", "True", "None"]


def test_a_linker_without_space_is_quoted() -> None:
    said = (
        b"/usr/bin/ld: final link failed: No space left on device\n"
        b"collect2: error: ld returned 1 exit status\n"
    )
    done = subprocess.CompletedProcess(["c++"], 1, b"", said)
    assert cpp._said(done).endswith("No space left on device")


def no_space(*arguments: Any, **settings: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["mkdir", "open", "replace"])
def test_no_space_for_the_cpp_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    require("cpu")
    calls: list[str] = []
    monkeypatch.setattr(cpp, "_compile", pretended_compile(calls))
    plain = getattr(Path, where)

    def full(self: Path, *arguments: Any, **settings: Any) -> Any:
        reads = where == "open" and not {*arguments, *settings.values()} & {"a"}
        return plain(self, *arguments, **settings) if reads else no_space()

    with monkeypatch.context() as patch:
        patch.setattr(Path, where, full)
        patch.setattr(folders, "temporary", no_space)
        with (
            pytest.warns(UserWarning, match=r"No space left on device; set DCNV4_CACHE_DIR"),
            pytest.raises(cpp.CompileError, match=r"DCNV4_CACHE_DIR.*No space left on device"),
        ):
            cpp.library(str(tmp_path / "cache"))
    built = len(calls)
    cpp.library(str(tmp_path / "cache"))
    assert len(calls) == built + 1


@pytest.mark.parametrize("where", ["mkstemp", "fdopen", "replace"])
def test_no_space_for_the_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """They are compiled in every process then, and no half entry is left."""
    owner: Any = folders.tempfile if where == "mkstemp" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, no_space)
        folders.write(tmp_path / "entry", b"code")
    assert not list(tmp_path.iterdir())
    folders.write(tmp_path / "entry", b"code")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"code"]


def pretended_compile(calls: list[str]) -> Callable[..., None]:
    """Instead of `_compile`: builds a library that has nothing in it, in no time."""

    def compile(compiler: list[str], options: Any, root: Path, stem: str) -> None:
        calls.append(stem)
        built = root / "built"
        subprocess.run(
            [*compiler, "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(built)],
            check=True,
            timeout=SECONDS,
        )
        built.chmod(0o700)
        built.replace(root / f"{stem}-{cpp._digest(built.read_bytes())}.so")

    return compile


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "foreign": lambda path: path.write_bytes(Path(sys.executable).read_bytes()),
    "removed": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    require("cpu")
    calls: list[str] = []
    monkeypatch.setattr(cpp, "_compile", pretended_compile(calls))
    cpp.library(str(tmp_path))
    cpp.library(str(tmp_path))
    assert len(calls) == 1
    (entry,) = tmp_path.glob("*.so")
    # What this process has loaded must stay as it is: the file is another one from here on.
    shutil.copy(entry, tmp_path / "copy")
    os.replace(tmp_path / "copy", entry)
    DAMAGES[damage](entry)
    if damage == "folder":  # somebody's doing, which is left alone
        with pytest.warns(UserWarning, match="is not used, so every process compiles"):
            cpp.library(str(tmp_path))
        entry.rmdir()
    cpp.library(str(tmp_path))
    assert len(calls) >= 2
    built = len(calls)
    cpp.library(str(tmp_path))
    assert len(calls) == built


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of the right name and checksum that is no library is passed over."""
    require("cpu")
    calls: list[str] = []
    monkeypatch.setattr(cpp, "_compile", pretended_compile(calls))
    cpp.library(str(tmp_path))
    (entry,) = tmp_path.glob("*.so")
    entry.unlink()
    text = tmp_path / "text"
    text.write_bytes(b"no library")
    text.rename(tmp_path / f"{calls[0]}-{cpp._digest(text.read_bytes())}.so")
    cpp.library(str(tmp_path))
    cpp.library(str(tmp_path))
    assert len(calls) == 2


# Interruptions.

# A compiler that hangs as long as a file is there.
HANGING = """\
#!/bin/sh
case "$*" in *-dM*) exec c++ "$@";; esac
if [ -e "{folder}/hang" ]; then echo $$ > "{folder}/started"; exec sleep 600; fi
exec c++ "$@"
"""
INTERRUPTED = """
    import signal, sys, torch
    from pathlib import Path
    from dcnv4 import backends
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    call = backends.Call("deform_conv", torch.device("cpu"), torch.float32)
    try:
        backends.choose(*call)
    except KeyboardInterrupt:
        Path(sys.argv[1]).unlink()
        print("interrupted")
    print(backends.choose(*call))
"""


@linux
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="interrupt", marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGKILL, id="kill"),
    ],
)
def test_a_compilation_that_is_ended_leaves_no_lock(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals
) -> None:
    """After Ctrl-C the same process can try again; after a kill the next one can."""
    require("cpu")
    compiler, hang, started = (tmp_path / name for name in ("compiler", "hang", "started"))
    compiler.write_text(HANGING.format(folder=tmp_path), encoding="utf-8")
    compiler.chmod(0o755)
    hang.touch()
    cache = tmp_path / "cache"
    environment = {"DCNV4_CACHE_DIR": str(cache), "CXX": str(compiler)}
    process = start(INTERRUPTED, str(hang), **environment)
    deadline = time.monotonic() + SECONDS
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    if number == signal.SIGINT:
        assert printed(process) == ["interrupted", "cpu"]
        assert not [path for path in cache.iterdir() if path.is_dir()]
        return
    assert process.wait(SECONDS) == -signal.SIGKILL
    try:
        hang.unlink()
        before = time.monotonic()
        # The compiler that nobody waits for is still there: it must hold no lock either.
        assert printed(start(INTERRUPTED, str(hang), **environment)) == ["cpu"]
        assert time.monotonic() - before < cpp._SECONDS / 2
    finally:
        os.kill(int(started.read_text()), signal.SIGKILL)


def test_an_interrupted_cuda_compilation_leaves_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(nvrtc, "_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nvrtc.kernel("conv_forward", (), 0)
    monkeypatch.setattr(nvrtc, "_kernel", lambda *arguments: "kernel")
    assert in_threads(2, lambda index: nvrtc.kernel("conv_forward", (), 0)) == ["kernel"] * 2


def small_inputs(backend: str) -> tuple[list[Tensor], Callable[..., Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 5, 5, 8).requires_grad_(), torch.randn(1, 5, 5, 54).requires_grad_()]
    return inputs, lambda *a: functional.deform_conv(*a, groups=2, backend=backend)


@EVERY_CPU_BACKEND
def test_an_exception_in_a_hook(name: str) -> None:
    """Of a gradient, in this thread and in others: the next call is right."""
    require(name)
    inputs, call = small_inputs(name)
    expected = torch.autograd.grad(call(*inputs).square().sum(), inputs)

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError("from a hook")

    def work(index: int) -> None:
        for where in ("input", "output"):
            leaves = [t.detach().requires_grad_() for t in inputs]
            output = call(*(t * 1 for t in leaves)) if where == "output" else call(*leaves)
            (output if where == "output" else leaves[0]).register_hook(fail)
            with pytest.raises(ZeroDivisionError, match="from a hook"):
                output.square().sum().backward()
            got = torch.autograd.grad(call(*inputs).square().sum(), inputs)
            assert all(torch.allclose(*pair) for pair in zip(got, expected, strict=True))

    work(0)
    in_threads(4, work)


@EVERY_CPU_BACKEND
@pytest.mark.parametrize("direction", ["conv_forward", "conv_backward"])
@pytest.mark.parametrize("dispatched", [False, True], ids=["plain", "dispatched"])
def test_an_exception_in_a_backend(
    monkeypatch: pytest.MonkeyPatch, name: str, direction: str, dispatched: bool
) -> None:
    """It comes out as it is, and while it is kept autograd still works."""
    require(name)
    inputs, call = small_inputs(name)

    def run() -> tuple[Tensor, ...]:
        if not dispatched:
            return torch.autograd.grad(call(*inputs).square().sum(), inputs)
        with torch.autograd.profiler.profile():  # a plain call goes past the dispatcher
            return torch.autograd.grad(call(*inputs).square().sum(), inputs)

    expected = run()

    def fail(*arguments: Any) -> None:
        raise MemoryError("no scratch")

    with monkeypatch.context() as patch:
        patch.setattr(backends.load(name), direction, fail)
        with pytest.raises(MemoryError, match="no scratch") as kept:
            run()
    for got, right in zip(run(), expected, strict=True):
        assert torch.equal(got, right)
    assert kept.value.__traceback__ is not None


# Copies, files, devices.


def layers() -> dict[str, nn.Module]:
    """With parameters that place points off the grid."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "DCNv4": DCNv4(
            8, group=2, dw_kernel_size=3, center_feature_scale=True, remove_center=True, stride=2
        ),
        "DCNv4Conv2d": DCNv4Conv2d(
            4, 8, (3, 5), padding="same", groups=2, dilation=2, offset_scale=0.5
        ),
        "FlashDeformAttn": FlashDeformAttn(8, n_levels=2, n_heads=2, n_points=2),
    }
    for layer in made.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def arguments(name: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 20, 8, generator=generator)
    if name == "DCNv4":
        return x, (4, 5)
    if name == "DCNv4Conv2d":
        return (torch.randn(2, 4, 6, 5, generator=generator),)
    return x[:, :3], torch.rand(2, 3, 2, 2, generator=generator), x, ((4, 4), (2, 2))


def apply(layer: nn.Module, name: str, *like: Any) -> Tensor:
    """The layer's output on its `arguments`, as `Tensor.to(*like)`."""
    moved = (a.to(*like) if like and isinstance(a, Tensor) else a for a in arguments(name))
    output: Tensor = layer(*moved)
    return output


LAYERS = pytest.mark.parametrize("name", ["DCNv4", "DCNv4Conv2d", "FlashDeformAttn"])


@LAYERS
def test_copies_of_a_layer_that_has_run(name: str) -> None:
    """Copies share nothing: training one leaves the others as they were."""
    layer = layers()[name]
    expected = apply(layer, name).detach()
    apply(layer, name).sum().backward()
    pickled = [pickle.dumps(layer, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), *map(pickle.loads, pickled), load(buffer)]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    for other in copies:
        assert torch.equal(apply(other, name), expected)
        apply(other, name).sum().backward()
    assert not torch.equal(apply(layer, name), expected)


def load(file: Any) -> Any:
    """What `torch.save` wrote, with the classes of whole modules."""
    return torch.load(file, weights_only=False)


def saved() -> dict[str, dict[str, Any]]:
    """Of every layer: itself, its state, and what it computes."""
    return {
        name: {
            "module": layer,
            "state": layer.state_dict(),
            "arguments": arguments(name),
            "output": apply(layer, name).detach(),
        }
        for name, layer in layers().items()
    }


@LAYERS
@pytest.mark.parametrize("file", sorted(DATA.glob("saved_by_torch_*.pt")), ids=lambda p: p.stem)
def test_saved_by_another_torch(name: str, file: Path) -> None:
    """Whole modules and states that an older and a newer PyTorch wrote, and what they compute."""
    found = load(file)[name]
    fresh = layers()[name]
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(found["state"], strict=True)
    for layer in (fresh, found["module"]):
        output = layer(*found["arguments"])
        torch.testing.assert_close(output, found["output"], rtol=1e-5, atol=1e-5)


def test_there_are_files_of_an_old_and_a_new_torch() -> None:
    assert len(list(DATA.glob("saved_by_torch_*.pt"))) >= 2


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HAS_HALF = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 2)
"""Whether PyTorch multiplies matrices of float16 on a CPU."""
# While no fixture replaces the functions that this context knows.
with torch.device("meta"):
    SHELLS = layers()


@LAYERS
def test_dtypes_in_any_order(name: str) -> None:
    """What a layer keeps of one dtype never serves another."""
    layer = layers()[name].double()
    exact = {p: t.clone() for p, t in layer.state_dict().items()}
    expected = apply(layer, name, torch.float64).detach()
    for dtype in (*DTYPES, *reversed(DTYPES), torch.float16, torch.float64):
        layer.to(dtype)
        layer.load_state_dict(exact)
        if dtype == torch.float16 and not HAS_HALF:
            continue
        output = apply(layer, name, dtype)
        output.float().sum().backward()
        assert output.dtype == dtype
        assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {dtype}
        layer.zero_grad()
        error = (output.double() - expected).norm() / expected.norm()
        assert error <= 32 * torch.finfo(dtype).eps, (dtype, error)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_through_the_meta_device(name: str, dtype: torch.dtype) -> None:
    """Made or moved there, given memory, and filled with a state."""
    layer = layers()[name].to(dtype)
    state, expected = layer.state_dict(), apply(layer, name, dtype)
    for shell in (copy.deepcopy(layer).to("meta"), copy.deepcopy(SHELLS[name]).to(dtype)):
        assert {p.device.type for p in shell.parameters()} == {"meta"}
        assert apply(shell, name, "meta", dtype).shape == expected.shape
        filled = shell.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*filled.parameters(), *filled.buffers()):
                tensor.fill_(float("nan"))
        filled.load_state_dict(state, strict=True)
        assert torch.equal(apply(filled, name, dtype), expected)
        filled.to("meta").to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
        assert apply(filled, name, dtype).isfinite().all()


@pytest.mark.gpu
@LAYERS
def test_devices_in_any_order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = layers()[name]
    expected = apply(layer, name)
    for device in ("cuda", "cpu", "cuda", "cpu"):
        layer.to(device)
        torch.testing.assert_close(apply(layer, name, device).cpu(), expected, rtol=1e-4, atol=1e-4)


# A loader's workers, started in both ways from a process whose kernels have run.
WORKERS = """
import sys, torch
from torch.utils.data import DataLoader, Dataset
from dcnv4 import DCNv4Conv2d, FlashDeformAttn


class Gradients(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.conv = DCNv4Conv2d(8, 8, padding=1, groups=2)
        self.attention = FlashDeformAttn(8, n_levels=1, n_heads=2)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((1, 8, 9, 9), float(index)).cos()
        y = self.conv(x).flatten(2).transpose(1, 2)
        output = self.attention(y, torch.full((1, 81, 1, 2), 0.3), y, [(9, 9)])
        self.conv.zero_grad()
        output.square().sum().backward()
        return output.detach(), self.conv.value_proj.weight.grad.clone()


if __name__ == "__main__":
    torch.set_num_threads(2)
    data = Gradients()
    expected = [data[index] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1])
    for _ in range(2):
        for found, right in zip(loader, expected):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, right))
    assert all(torch.equal(a, b) for a, b in zip(data[0], expected[0]))
    print("fine")
"""


@linux
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_loader(tmp_path: Path, method: str) -> None:
    program = tmp_path / "workers.py"
    program.write_text(WORKERS, encoding="utf-8")
    # In a session of its own: what hangs is ended with its workers.
    process = subprocess.Popen(
        [sys.executable, str(program), method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert printed(process, 120) == ["fine"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


if __name__ == "__main__":
    torch.save(saved(), sys.argv[1])
