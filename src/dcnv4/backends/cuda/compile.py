"""Kernels from source to launch: NVRTC, one cache in memory and one on disk.

A kernel is compiled for one architecture and one set of macros, at its first call. What is on disk
is trusted only with its checksum, and losing it costs a compilation (about 0.3 s).
"""

from __future__ import annotations

import hashlib
import re
from ctypes import addressof, c_char_p
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from .. import INCOMPLETE, cache_dir
from ..folders import private, read, write
from . import launch

KERNELS = (
    *("conv_forward", "conv_tile_forward"),
    *("conv_backward", "conv_sorted_backward", "conv_tile_backward"),
    *("attn_forward", "attn_backward", "attn_sorted_backward"),
    *("zeros", "fixed_point_scale", "convert_sums"),
    *("linear", "mlp", "layer_norm_forward", "layer_norm_backward"),
)
"""Every kernel, the name of its source file."""
_OF_ONE_ARCHITECTURE = frozenset({"linear", "mlp"})
"""Those with instructions that later ones lack."""
Macros = tuple[tuple[str, str], ...]

_FOLDER = Path(__file__).parent / "kernels"
_INCLUDE = Path(__file__).parents[1] / "include"
_ENTRIES = r"[a-z_]+-[0-9a-f]{32}|tmp\w+"  # what the names of entries look like
_DIGEST = 32  # bytes of the checksum that an entry of the cache begins with
_OLDEST = (7, 0)  # compute capability: what `numbers.cuh` is written for
_lock = Lock()


@cache
def why_not(index: int | None) -> str | None:
    """What keeps GPU `index` (None: the current one) from running kernels, in one sentence."""
    if torch.version.hip is not None:
        return f"needs an NVIDIA GPU; got ROCm {torch.version.hip}, which the triton backend serves"
    missing = _missing()
    if missing:
        return f"{INCOMPLETE}; got no {', '.join(missing)}"
    major = max(12, int((torch.version.cuda or "13").split(".")[0]))
    install = "pip install -U 'cuda-core[cu{}]'"
    try:
        from cuda.bindings import driver, nvrtc

        if find_spec("cuda.core") is None:
            raise ModuleNotFoundError("No module named 'cuda.core'")
        found = version("cuda-core")
    except ImportError as error:
        return (
            f"needs cuda-core ({install.format(major)}); got {type(error).__name__}: {_line(error)}"
        )
    if int(found.split(".")[0]) < 1:
        return f"needs cuda-core >= 1 ({install.format(major)}); got {found}"
    try:
        compiler = _nvrtc_version()
    except Exception as error:
        package = f"nvidia-cuda-nvrtc{'-cu12' if major == 12 else ''}"
        return f"needs NVRTC (pip install {package}); got {type(error).__name__}: {_line(error)}"
    if not torch.cuda.is_available():
        return f"needs a CUDA GPU that PyTorch sees; got none with torch {torch.__version__}"
    newest = int(driver.cuDriverGetVersion()[1])
    if newest // 1000 < compiler[0]:
        return (
            f"needs an NVIDIA driver for CUDA {compiler[0]} (update it, or "
            f"{install.format(newest // 1000)}); got one for CUDA "
            f"{newest // 1000}.{newest % 1000 // 10}"
        )
    capability = torch.cuda.get_device_capability(index)
    known = nvrtc.nvrtcGetSupportedArchs()[1]
    if capability < _OLDEST or 10 * capability[0] + capability[1] not in known:
        return (
            f"needs a GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer that NVRTC "
            f"{compiler[0]}.{compiler[1]} knows (pip install -U nvidia-cuda-nvrtc); "
            f"got {capability[0]}.{capability[1]}"
        )
    return None


class Kernel:
    """A compiled kernel whose one parameter is a structure, passed by value."""

    def __init__(self, name: str, code: bytes, index: int, shared: int) -> None:
        from cuda.bindings import driver

        self._index, self._shared = index, shared
        self._start, self._start_early = driver.cuLaunchKernel, driver.cuLaunchKernelEx
        # The library is never unloaded: a graph may hold its kernel longer than anything here.
        library = _check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        self._kernel = _check(driver.cuLibraryGetKernel(library, name.encode()))
        if shared:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            device = _check(driver.cuDeviceGet(index))
            _check(driver.cuKernelSetAttribute(most, shared, self._kernel, device))

    def __call__(
        self, blocks: int, threads: int, stream: int, arguments: bytes, early: bool = False
    ) -> None:
        """Start it on a stream of its GPU, which must be the current one.

        Args:
            early: whether it may begin before the stream's last launch has ended, see `overlaps`.
        """
        pointer = c_char_p(arguments)
        parameters = addressof(pointer)
        launch: tuple[Any, ...]
        if early:
            start = self._start_early
            grid = _configuration(blocks, threads, self._shared, stream)
            launch = grid, self._kernel, parameters, 0
        else:
            start = self._start
            sizes = blocks, 1, 1, threads, 1, 1, self._shared
            launch = self._kernel, *sizes, stream, parameters, 0
        result = start(*launch)
        if result[0]:
            if result[0].name == "CUDA_ERROR_INVALID_CONTEXT":
                _make_current(self._index)  # a thread in which nothing has used CUDA yet
                result = start(*launch)
            _check(result)


@lru_cache(1024)
def _configuration(blocks: int, threads: int, shared: int, stream: int) -> Any:
    """The grid of a launch that may begin early."""
    from cuda.bindings import driver

    early = driver.CUlaunchAttribute()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    configuration = driver.CUlaunchConfig()
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = blocks, 1, 1
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = threads, 1, 1
    configuration.sharedMemBytes, configuration.hStream = shared, stream
    configuration.attrs, configuration.numAttrs = [early], 1
    return configuration


@cache
def overlaps(index: int) -> bool:
    """Whether GPU `index` can begin a launch before the last one has ended, in graphs too."""
    return torch.cuda.get_device_properties(index).major >= 9 and (_driver_version() or 0) >= 12030


def _make_current(index: int) -> None:
    """Make the context that PyTorch uses on GPU `index` this thread's."""
    from cuda.bindings import driver

    device = _check(driver.cuDeviceGet(index))
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))


def _check(result: tuple[Any, ...]) -> Any:
    """What a function of the driver returned, unless that is an error."""
    if result[0]:
        raise RuntimeError(f"the CUDA driver refused a kernel: {result[0].name}")
    return result[1] if len(result) > 1 else None


def kernel(name: str, macros: Macros, index: int, shared: int = 0) -> Kernel:
    """The kernel `name` for GPU `index`, whose launches get so many bytes of shared memory."""
    with _lock:
        return _kernel(name, macros, index, shared)


@cache
def _kernel(name: str, macros: Macros, index: int, shared: int) -> Kernel:
    major, minor = torch.cuda.get_device_capability(index)
    return Kernel(name, cached(name, macros, architecture(name, major, minor)), index, shared)


def architecture(name: str, major: int, minor: int) -> str:
    """What kernel `name` is compiled for where it is to run on such a compute capability."""
    return f"sm_{major}{minor}{'a' if name in _OF_ONE_ARCHITECTURE else ''}"


def cached(name: str, macros: Macros, arch: str) -> bytes:
    """The machine code of kernel `name`, from the disk or compiled and then kept there."""
    key = "\0".join(
        (name, arch, repr(macros), repr(_nvrtc_version()), str(_driver_version()), _sources())
    )
    root = private(cache_dir())
    folder = None if root is None else private(root / "cuda", _ENTRIES)
    if folder is None:
        return compile(name, macros, arch)
    path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    entry = read(path)
    code = entry[_DIGEST:]
    if code and entry[:_DIGEST] == _checksum(key, code):
        return code
    code = compile(name, macros, arch)
    write(path, _checksum(key, code) + code)
    return code


def compile(name: str, macros: Macros, arch: str) -> bytes:
    """The machine code of kernel `name` for architecture `arch`. Needs no GPU and no driver."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=name,
        arch=arch,
        std="c++17",
        include_path=[str(_FOLDER), str(_INCLUDE)],
        define_macro=list(macros),
    )
    return bytes(Program(source(name), "c++", options).compile("cubin").code)


def source(name: str) -> str:
    """What is compiled as kernel `name`: its file, the structure of its arguments in front."""
    (file,) = _FOLDER.glob(f"*/{name}.cu")
    return launch.structure(name) + file.read_text(encoding="utf-8")


def _checksum(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + code).digest()


def _files() -> list[Path]:
    return sorted([*_FOLDER.glob("*/*.cu*"), *_INCLUDE.glob("*.h")])


@cache
def _sources() -> str:
    """The text of all kernels, which every cache entry depends on."""
    texts = (file.read_text(encoding="utf-8") for file in _files())
    return "\0".join((*map(launch.structure, KERNELS), *texts))


def _missing() -> list[str]:
    """Names of source files that this installation has lost."""
    needed = {"sampling.h", *(f"{name}.cu" for name in KERNELS)}
    needed.update(re.findall(r"#include <\w+/(\w+\.cuh)>", _sources()))
    return sorted(needed - {file.name for file in _files()})


@cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


@cache
def _driver_version() -> int | None:
    from cuda.bindings import driver

    try:
        return int(driver.cuDriverGetVersion()[1])
    except Exception:  # no driver: kernels can be compiled, not run
        return None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
