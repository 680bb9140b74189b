"""Looks at every operator that tensors of the pretended GPU go through."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_torchrec.benchmarks.rehearsal.counts import Counts, where
from mim_torchrec.benchmarks.rehearsal.storages import Storages

VIEWS = frozenset(
    "aten::" + name
    for name in (
        "view _unsafe_view t transpose.int detach slice.Tensor select.int expand unsqueeze squeeze.dim alias "
        "as_strided permute split.Tensor split_with_sizes unbind.int _reshape_alias squeeze unfold "
        "view.dtype lift_fresh empty.memory_format empty_like new_empty empty_strided new_empty_strided "
        "chunk is_same_size resize_ set_.source_Tensor sym_size.int values crow_indices col_indices "
        "_sparse_csr_tensor_unsafe _sparse_compressed_tensor_unsafe "
        "sparse_compressed_tensor.comp_plain_value_size _local_scalar_dense is_pinned "
        "_pin_memory squeeze.dims diagonal movedim.int narrow record_stream _has_same_storage_numel"
    ).split()
)
"""Operators that run no kernel."""

WAIT = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::is_nonzero": "item",
    "aten::bincount": "bincount",
    "aten::histc": "histc",
    "fbgemm::jagged_unique_indices": "jagged_unique_indices",
}
"""Operators for which the host waits, because the size of what they give depends on values."""

INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
MAY_MIX = frozenset(("aten::copy_", "aten::_to_copy", "aten::set_", "aten::record_stream", *INDEXING))
TAKE_NO_SCALARS = frozenset(
    ("aten::cat", "aten::stack", "aten::index_select", "aten::mm", "aten::addmm", "aten::bmm")
)
OWN_DEVICES = ("c10d::", "_c10d_functional::", "fbgemm::", "profiler::", "prim::", "quantized::")
CHOSEN_FOR_CPUS = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    )
)
"""What operators of several forms run on a CPU, where a GPU runs another form."""
KERNELS = (
    "CUDA",
    "SparseCsrCUDA",
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


class Watch(TorchDispatchMode):
    """Counts, checks that tensors of an operator are on one device, and says where its results are.

    Args:
        storages: where tensors are.
        counts: of this process.
        strict: raise at the first operator whose tensors are on different devices, as a GPU would.
    """

    def __init__(self, storages: Storages, counts: Counts, strict: bool = True) -> None:
        super().__init__()
        self.storages, self.counts, self.strict = storages, counts, strict
        self.as_cpu = 0
        """Above 0 while tensors say where they really are."""
        self._uncounted = 0
        self._placed = 0

    @property
    def is_counting(self) -> bool:
        """Whether nobody counts in its place."""
        return not self._uncounted

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Have tensors say where they really are."""
        self.as_cpu += 1
        try:
            yield
        finally:
            self.as_cpu -= 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave what follows to the caller to count."""
        self._uncounted += 1
        try:
            yield
        finally:
            self._uncounted -= 1

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Leave it to the caller to say where a new tensor is."""
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [self.storages.place_of(tensor) for tensor in tensors]
        name = func._schema.name
        on_gpu = "cuda" in places
        if on_gpu and not self._uncounted:
            self._examine(func, name, tensors, places, args, kwargs)
        elif name.startswith("c10d::"):
            self._one_device(name, [place for place in places if place != "any"])
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if on_gpu and not name.endswith("copy_"):
            for result in results:
                self.storages.put(result, "cuda")
        elif results and (("any" in places and "cpu" not in places) or not (tensors or self._placed)):
            for result in results:
                self.storages.put(result, "any")
        return out

    def _examine(
        self,
        func: Any,
        name: str,
        tensors: list[Tensor],
        places: list[Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        full = name if func._overloadname == "default" else f"{name}.{func._overloadname}"
        if (
            not name.startswith(OWN_DEVICES)
            and name not in CHOSEN_FOR_CPUS
            and not any(torch._C._dispatch_has_kernel_for_dispatch_key(full, key) for key in KERNELS)
        ):
            self.counts.no_kernel[full] += 1
        if full not in VIEWS and not (name == "aten::copy_" and places[0] != places[-1]):
            self.counts.launch(full)
        self._waits(name, tensors, places, args, kwargs)
        if name.startswith("c10d::"):
            self._one_device(name, [place for place in places if place != "any"])
        elif not name.startswith(OWN_DEVICES) and name not in MAY_MIX:
            if any(
                place in ("cpu", "pinned") and (tensor.dim() or name in TAKE_NO_SCALARS)
                for tensor, place in zip(tensors, places, strict=True)
            ):
                self._mixed(name)
        elif name in INDEXING and places[0] != "cuda" and places[0] != "any":
            self._mixed(f"{name} of a tensor in memory")

    def _waits(
        self,
        name: str,
        tensors: list[Tensor],
        places: list[Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        if name in WAIT:
            self.counts.sync(WAIT[name])
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self.counts.sync("repeat_interleave")
        elif name in INDEXING:
            for index, place in zip(tensors[1:], places[1:], strict=True):
                if index.dtype == torch.bool:
                    self.counts.sync("boolean index")
                if place in ("cpu", "pinned") and index.dim() and not index.is_floating_point():
                    self.counts.upload("index")
        elif name == "aten::copy_" and places[0] != places[1] and "any" not in places:
            if places[0] == "cuda":
                self.counts.upload("copy", pinned=places[1] == "pinned" or not tensors[1].dim())
            elif not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.counts.sync("to cpu")

    def _one_device(self, name: str, places: list[Any]) -> None:
        if len({"cpu" if place == "pinned" else place for place in places}) > 1:
            self._mixed(name)

    def _mixed(self, name: str) -> None:
        problem = f"{name} {where()}"
        self.counts.mixed[problem] += 1
        if self.strict:
            raise RuntimeError(f"Expected all tensors to be on the same device: {problem}")
