"""A device "gpu" whose data lie in main memory: what CUDA refuses is noted, and what it waits for.

    with fake_device.watch() as log: ...
    log.problems    operations on tensors of two devices, which CUDA refuses
    log.waits       copies between the devices and reads of a value, for which the CPU waits

Both name the line of the repository that did it. Inside, `torch.device("gpu")` is this device.
"""

import traceback
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from sd.files import ROOT


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Gradient checkpointing asks for it; an error in a backward pass would end the process."""
        return [torch.float16]


_setup_privateuseone_for_python_backend("gpu", Backend())
GPU = torch.device("gpu:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
READS = {  # whose result, or its shape, the CPU needs
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
    aten.masked_select.default,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
log = SimpleNamespace(problems=Counter(), waits=Counter())


class OnGpu(torch.Tensor):
    """A tensor of the device; `data_on_cpu` holds its numbers."""

    @staticmethod
    def __new__(cls, data: torch.Tensor):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), dtype=data.dtype, device=GPU, **layout
        )
        tensor.data_on_cpu = data
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        """As `Module.to` sets it."""
        torch.Tensor.data.__set__(self, other)
        self.data_on_cpu = other.data_on_cpu

    def __setitem__(self, index, value) -> None:
        """A list as index becomes a tensor here, for torch would make that out of sight."""
        super().__setitem__(torch.tensor(index) if isinstance(index, list) else index, value)

    def __reduce_ex__(self, protocol):
        """Saved as on the CPU; `torch.load` moves it, inside `watch`, where map_location says."""
        return self.data_on_cpu.__reduce_ex__(protocol)

    def tolist(self) -> list:
        log.waits[line()] += 1
        return self.data_on_cpu.tolist()


def map_leaves(function, tree):
    """As torch's tree_map, for the arguments of an operation, in a fifth of its time."""
    if isinstance(tree, tuple | list):
        return type(tree)([map_leaves(function, part) for part in tree])
    if isinstance(tree, dict):
        return {key: map_leaves(function, part) for key, part in tree.items()}
    return function(tree)


def line() -> str:
    """The innermost line of the repository, but for the tests, that is being run."""
    frames = reversed(traceback.extract_stack())
    files = ((frame.filename, frame.lineno) for frame in frames)
    own = (
        f"{file.removeprefix(f'{ROOT}/')}:{number}"
        for file, number in files
        if file.startswith(str(ROOT)) and "/tests/" not in file
    )
    return next(own, "the test")


def dispatch(function, args, kwargs):
    leaves = []
    map_leaves(leaves.append, (args, kwargs))
    leaves = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    on_gpu = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    check_mixing(function, args, leaves, on_gpu)
    device = kwargs.get("device")
    result_on_gpu = bool(on_gpu)
    if function is aten.copy_.default:
        result_on_gpu = isinstance(args[0], OnGpu)
        if result_on_gpu != isinstance(args[1], OnGpu):
            log.waits[line()] += 1
    elif function is aten._local_scalar_dense.default:
        result_on_gpu = False
    elif device is not None:
        result_on_gpu = torch.device(device).type == "gpu"
        if function is aten._to_copy.default and result_on_gpu != bool(on_gpu):
            log.waits[line()] += 1
    if function in READS and on_gpu:
        log.waits[line()] += 1

    def lower(leaf):
        if isinstance(leaf, torch.device) and leaf.type == "gpu":
            return torch.device("cpu")
        return leaf.data_on_cpu if isinstance(leaf, OnGpu) else leaf

    wrappers = {id(leaf.data_on_cpu): leaf for leaf in on_gpu}  # of what is changed in place

    def lift(leaf):
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, OnGpu):
            return leaf
        if id(leaf) in wrappers:
            return wrappers[id(leaf)]
        return OnGpu(leaf) if result_on_gpu else leaf

    args, kwargs = map_leaves(lower, (args, kwargs))
    kwargs.pop("pin_memory", None)
    return map_leaves(lift, function(*args, **kwargs))


def check_mixing(function, args, leaves, on_gpu) -> None:
    """A number of the CPU may meet a tensor of the GPU; larger tensors may not."""
    if not on_gpu or function in COPIES:
        return
    numbers = [leaf for leaf in leaves if not isinstance(leaf, OnGpu)]
    tensors = [leaf for leaf in numbers if leaf.ndim]
    if function in INDEXED and isinstance(args[0], OnGpu):
        if tensors:  # indices are copied
            log.waits[line()] += 1
    elif tensors or numbers and torch.Tag.pointwise not in function.tags:
        log.problems[f"{function} at {line()}"] += 1


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


@contextmanager
def watch():
    """Inside, there is the device, and `log` begins anew."""
    log.problems.clear()
    log.waits.clear()
    plain, load = torch.tensor, torch.load
    threads = torch._C._is_multithreading_enabled()

    def tensor(content, *args, device=None, **kwargs):
        made = plain(content, *args, **kwargs)
        return made if device is None else made.to(device)

    def load_to(file, map_location="cpu"):
        content = load(file, map_location="cpu")
        return tree_map_only(torch.Tensor, lambda leaf: leaf.to(map_location), content)

    torch.tensor, torch.load = tensor, load_to
    torch._C._set_multithreading_enabled(False)  # a mode belongs to a thread
    try:
        with Mode():
            yield log
    finally:
        torch.tensor, torch.load = plain, load
        torch._C._set_multithreading_enabled(threads)
