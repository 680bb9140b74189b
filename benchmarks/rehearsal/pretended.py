"""A pretended GPU: real values in memory, in tensors that say that they are on a GPU.

A tensor's storage counts as one of the GPU (`storages.py`). What makes tensors or moves them is replaced,
what computes with them is looked at (`watch.py`), fbgemm's tables run by their kernels for CPUs, and
`torch.autocast` by its rules for CPUs. So a program runs to its end with the results it has on a CPU, and
what a GPU would refuse is an error.

Not here: streams that really run side by side (`streams.py` counts for two), NCCL, and what C++ does with a
device by itself.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mim_torchrec.benchmarks.rehearsal.counts import Counts
from mim_torchrec.benchmarks.rehearsal.fbgemm import missing_kernels, tables_by_kernels_of_cpus
from mim_torchrec.benchmarks.rehearsal.storages import Storages, real_device
from mim_torchrec.benchmarks.rehearsal.streams import cuda_functions
from mim_torchrec.benchmarks.rehearsal.watch import Watch

FACTORIES = (
    "zeros ones empty full arange rand randn randint randperm tensor as_tensor linspace logspace eye "
    "empty_strided zeros_like ones_like empty_like full_like rand_like randn_like randint_like scalar_tensor "
    "asarray sparse_csr_tensor"
).split()
OF_DATA = ("tensor", "as_tensor", "asarray", "scalar_tensor")
METHODS = "new_zeros new_ones new_empty new_full new_tensor".split()


@contextmanager
def pretended_gpu(counts: Counts, strict: bool = True) -> Iterator[Watch]:
    """Have this process take its memory for that of a GPU.

    Args:
        counts: get what is counted.
        strict: raise at the first operator whose tensors are on different devices.

    Yields:
        What looks at the operators.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    storages = Storages()
    watch = Watch(storages, counts, strict)
    functions = cuda_functions(counts, device)
    patches = [
        (torch.Tensor, _attributes(storages, watch, device)),
        (torch.Tensor, _moves(storages, counts, watch, device)),
        (torch.Tensor, {name: _method(name, storages, counts, watch) for name in METHODS}),
        (torch, {name: _factory(name, storages, counts, watch) for name in FACTORIES}),
        (torch.cuda, functions),
        (torch.accelerator, {
            "is_available": lambda: True,
            "current_accelerator": lambda **_: torch.device("cuda"),
            "current_stream": functions["current_stream"],
        }),
        (torch.amp.autocast_mode.autocast, {"__init__": _autocast(torch.autocast.__init__)}),
        (dist, {
            "init_process_group": _init_process_group(dist.init_process_group),
            "reduce_scatter_single": _reduce_scatter(dist.reduce_scatter_single, counts, watch),
        }),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, replaced in patches:
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(tables_by_kernels_of_cpus(storages, watch))
        stack.enter_context(missing_kernels(watch))
        stack.enter_context(watch)
        yield watch


def _is_gpu(device: Any) -> bool:
    if isinstance(device, str):
        device = torch.device(device)
    return device is not None and (isinstance(device, int) or device.type == "cuda")


def _init_process_group(real: Callable[..., Any]) -> Callable[..., Any]:
    def init_process_group(backend: str, **options: Any) -> None:
        if backend not in ("gloo", "cpu:gloo,cuda:nccl"):
            raise ValueError(f"a process group of {backend} has nobody to exchange tensors of GPUs")
        options.pop("device_id", None)
        real("gloo", **options)

    return init_process_group


def _autocast(real: Callable[..., None]) -> Callable[..., None]:
    def init(context: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        real(context, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init


def _reduce_scatter(real: Callable[..., Any], counts: Counts, watch: Watch) -> Callable[..., Any]:
    """One operator, as NCCL has; gloo reduces a copy and copies a part of it back."""

    def reduce_scatter_single(*args: Any, **kwargs: Any) -> Any:
        counts.launch("c10d::_reduce_scatter_base_")
        with watch.uncounted():
            return real(*args, **kwargs)

    return reduce_scatter_single


def _attributes(storages: Storages, watch: Watch, device: torch.device) -> dict[str, Any]:
    def where(tensor: Tensor) -> torch.device:
        if type(tensor).__name__ == "ShardedTensor":
            shards = tensor.local_shards()  # type: ignore[attr-defined]
            return where(shards[0].tensor) if shards else device
        real = real_device(tensor)
        if watch.as_cpu:
            return real
        return device if real.type == "cpu" and storages.on_gpu(tensor) else real

    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        return storages.put(real_copy(tensor, memo), storages.place_of(tensor))

    def wrapper(cls: Any, *args: Any, **kwargs: Any) -> Tensor:
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return real_wrapper(cls, *args, **kwargs)

    real_copy = torch.Tensor.__deepcopy__
    real_wrapper = torch.Tensor._make_wrapper_subclass
    return {
        "device": property(where),
        "is_cuda": property(lambda tensor: where(tensor).type == "cuda"),
        "is_cpu": property(lambda tensor: where(tensor).type == "cpu"),
        "get_device": lambda tensor: device.index if storages.on_gpu(tensor) else -1,
        "_make_wrapper_subclass": staticmethod(wrapper),
        "record_stream": lambda *_: None,
        "__deepcopy__": deepcopy,
    }


def _moves(storages: Storages, counts: Counts, watch: Watch, device: torch.device) -> dict[str, Any]:
    real_to, real_numpy = torch.Tensor.to, torch.Tensor.numpy
    real_array, real_tolist = torch.Tensor.__array__, torch.Tensor.tolist

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        words, target = list(args), kwargs.get("device")
        if words and isinstance(words[0], Tensor):
            target = words[0].device
            words[0] = words[0].dtype
            if target.type != "cuda":
                words = list(args)
        elif words and isinstance(words[0], (torch.device, str, int)):
            target = words[0] if not isinstance(words[0], int) else torch.device("cuda", words[0])
            if _is_gpu(target):
                words[0] = "cpu"
        elif target is not None and _is_gpu(target):
            kwargs = {**kwargs, "device": "cpu"}
        if target is None or real_device(tensor).type == "meta" or torch.device(target).type == "meta":
            if target is not None and _is_gpu(target):
                raise NotImplementedError("Cannot copy out of meta tensor; no data!")
            return real_to(tensor, *args, **kwargs)
        place = storages.place_of(tensor)
        if (place == "cuda") == _is_gpu(target) or place == "any":
            return storages.put(real_to(tensor, *words, **kwargs), "cuda" if _is_gpu(target) else "cpu")
        with watch.uncounted():
            moved = real_to(tensor, *words, **kwargs)
            if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                moved = moved.clone()
        waits = not (kwargs.get("non_blocking") or (len(args) > 1 and args[-1] is True))
        if _is_gpu(target):
            counts.upload("to", pinned=place == "pinned" and not waits)
        elif waits:
            counts.sync("to cpu")
        return storages.put(moved, "cuda" if _is_gpu(target) else "cpu")

    def numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if storages.on_gpu(tensor):
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first.")
        return real_numpy(tensor, *args, **kwargs)

    def array(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if storages.on_gpu(tensor):
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first.")
        return real_array(tensor, *args, **kwargs)

    def tolist(tensor: Tensor) -> Any:
        if storages.on_gpu(tensor) and watch.is_counting:
            counts.sync("tolist")
        with watch.uncounted():
            return real_tolist(tensor)

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        return storages.put(tensor.clone(), "pinned")

    return {
        "to": to,
        "cuda": lambda tensor, device=None, non_blocking=False, **_: to(
            tensor, torch.device("cuda"), non_blocking=non_blocking
        ),
        "cpu": lambda tensor, **_: to(tensor, torch.device("cpu")),
        "numpy": numpy,
        "__array__": array,
        "tolist": tolist,
        "pin_memory": pin_memory,
        "is_pinned": lambda tensor, *_: storages.place_of(tensor) == "pinned",
    }


def _factory(name: str, storages: Storages, counts: Counts, watch: Watch) -> Callable[..., Any]:
    real = getattr(torch, name)
    keeps = name.endswith("_like") or name in ("as_tensor", "asarray")

    @functools.wraps(real)
    def make(*args: Any, **kwargs: Any) -> Any:
        device, pinned = kwargs.get("device"), bool(kwargs.pop("pin_memory", False))
        on_gpu = _is_gpu(device)
        if on_gpu:
            kwargs["device"] = "cpu"
        of = args[0] if args and isinstance(args[0], Tensor) else None
        place = storages.place_of(of) if of is not None else None
        if device is not None and place == "cuda" and not on_gpu and name in ("as_tensor", "asarray"):
            return real(args[0].to(device), *args[1:], **kwargs)
        with watch.placed():
            made = real(*args, **kwargs)
        if on_gpu:
            if name in OF_DATA and place != "cuda":
                counts.upload(name)
                made = made.clone() if of is not None and made is of else made
            elif name not in ("empty", "empty_like", "empty_strided") and name not in OF_DATA:
                counts.launch(f"aten::{name}")
            storages.put(made, "cuda")
        elif device is None and keeps:
            if place == "cuda" and made is not of:
                storages.put(made, "cuda")
        elif name != "sparse_csr_tensor" and made is not of:
            storages.put(made, "pinned" if pinned else "cpu")
        return made

    return make


def _method(name: str, storages: Storages, counts: Counts, watch: Watch) -> Callable[..., Any]:
    real = getattr(torch.Tensor, name)

    @functools.wraps(real)
    def make(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        on_gpu = _is_gpu(device) or (device is None and storages.on_gpu(tensor))
        if device is not None:
            kwargs["device"] = "cpu" if on_gpu else device
        with watch.placed():
            made = real(tensor, *args, **kwargs)
        if on_gpu and name == "new_tensor":
            counts.upload(name)
        return storages.put(made, "cuda" if on_gpu else "cpu")

    return make
