"""Which tensors in memory count as tensors of a GPU.

A tensor's storage says where it is, so that views are where their base is. Storages that nothing has placed
are in memory. Those that an operator in C++ has made of nothing may be on either side: nobody can tell.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Place = Literal["cpu", "pinned", "cuda", "any", "meta"]
_device = torch._C.TensorBase.device
_CSR_PARTS = ("crow_indices", "col_indices", "values")


class Storages:
    """Places of storages; it keeps none alive."""

    def __init__(self) -> None:
        self._placed: dict[int, tuple[StorageWeakRef, Place]] = {}

    def put(self, tensor: Any, place: Place) -> Any:
        """Have a tensor, and all that share its storage, count as being somewhere; returns it."""
        if not isinstance(tensor, Tensor):
            return tensor
        if type(tensor).__name__ == "DTensor":
            self.put(tensor._local_tensor, place)  # type: ignore[attr-defined]
        elif tensor.layout is torch.sparse_csr:
            for part in _CSR_PARTS:
                self.put(getattr(tensor, part)(), place)
        elif tensor.layout is torch.strided and real_device(tensor).type == "cpu":
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # a wrapper, whose parts are placed
                return tensor
            if place == "cpu":
                self._placed.pop(storage._cdata, None)
            else:
                self._placed[storage._cdata] = StorageWeakRef(storage), place
        return tensor

    def place_of(self, tensor: Tensor) -> Place:
        """Where a tensor counts as being."""
        name = type(tensor).__name__
        if name == "ShardedTensor":
            shards = tensor.local_shards()  # type: ignore[attr-defined]
            return self.place_of(shards[0].tensor) if shards else "any"
        if name == "DTensor":
            return self.place_of(tensor._local_tensor)  # type: ignore[attr-defined]
        if name == "AsyncCollectiveTensor":
            return self.place_of(tensor.elem)  # type: ignore[attr-defined]
        if tensor.layout is not torch.strided:
            return self.place_of(tensor.values()) if tensor.layout is torch.sparse_csr else "any"
        if real_device(tensor).type != "cpu":
            return "meta"
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return "any"
        found = self._placed.get(key)
        if found is None:
            return "cpu"
        if found[0].expired():
            del self._placed[key]
            return "cpu"
        return found[1]

    def on_gpu(self, tensor: Tensor) -> bool:
        """Whether a tensor counts as one of the GPU."""
        return self.place_of(tensor) == "cuda"


def real_device(tensor: Tensor) -> torch.device:
    """Where a tensor really is."""
    return _device.__get__(tensor)
