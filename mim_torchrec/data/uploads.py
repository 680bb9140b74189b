"""Tensors that go to a GPU in one copy, from one buffer of page-locked memory, and those that come back.

A copy costs the host more than its bytes, and from other memory the host waits for it. Not here: what is
sent, and when.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes, at multiples of which tensors begin."""


class Upload:
    """Collects tensors in memory, and sends all of them to a device at once.

    On a CPU it gives the tensors themselves.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []
        self._there: list[Tensor] | None = None

    def add(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Take a tensor along; returns what gives it on the device, after `send`."""
        place = len(self._tensors)
        self._tensors.append(tensor)

        def there() -> Tensor:
            assert self._there is not None, "nothing has been sent yet"
            return self._there[place]

        return there

    def send(self) -> None:
        """Start the copy; the host does not wait for it."""
        if self._device.type == "cpu":
            self._there = self._tensors
        else:
            self._there = moved_together(in_one_buffer(self._tensors), self._device, non_blocking=True)


def download(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to memory; returns what waits for it, and for nothing launched later."""
    there = tensor.to("cpu", non_blocking=True)  # into page-locked memory
    if not tensor.is_cuda:
        return lambda: there
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return there

    return arrived


def in_one_buffer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors as views of one buffer; of page-locked memory, where there is a GPU."""
    starts = [0]
    for tensor in tensors:
        starts.append(-(-(starts[-1] + tensor.nbytes) // ALIGNMENT) * ALIGNMENT)
    whole = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    views = [_view(whole, tensor, start) for tensor, start in zip(tensors, starts, strict=False)]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    return views


def moved_together(views: Sequence[Tensor], device: torch.device, non_blocking: bool = False) -> list[Tensor]:
    """Views of one buffer as views of its copy on a device."""
    whole = torch.empty(0, dtype=torch.uint8, device=views[0].device).set_(views[0].untyped_storage())
    there = whole.to(device, non_blocking=non_blocking)
    return [_view(there, view, int(view.storage_offset()) * view.element_size()) for view in views]


def _view(whole: Tensor, like: Tensor, start: int) -> Tensor:
    return whole[start : start + like.nbytes].view(like.dtype).view(like.shape)
