"""An encoder without values, inside a training step with values: what fits nowhere can still be counted.

Parameters, activations, gradients and optimizer state of the encoder are fake tensors, which have a shape and
no memory; those of the CTR model around it are real, because what a search keeps depends on values.
Modes that count operations or storages see both, in the order in which a real step would run them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.encoders.item_encoder import ItemEncoder


def empty_out(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replace parameters and buffers of a module by fake ones, so that their memory is given back."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty: Tensor = fake.from_tensor(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                tensors[name] = made[id(tensor)]


class FakeEncoder(nn.Module):
    """What `end_to_end.Encoded` is, without values: its vectors are zeros.

    Args:
        encoder: loses its values.
        num_tokens: of every title.
        trained: let gradients through to the encoder. They stay between steps, as the buckets of data
            parallel wrappers do.
        settings: learning rate and weight decay.
    """

    def __init__(self, encoder: ItemEncoder, num_tokens: int, trained: bool, settings: CTRConfig) -> None:
        super().__init__()
        self.dim = encoder.table_dim
        self._fake = FakeTensorMode()
        self._size, self._num_tokens = encoder.vision.image_size, num_tokens
        empty_out(encoder if trained else encoder.requires_grad_(False), self._fake)
        encoder.train(trained)
        self._held = (encoder,)  # no submodule: wrappers and optimizers of the model would read its values
        self._trained = [p for p in encoder.parameters() if p.requires_grad]
        self._optimizer: torch.optim.Optimizer | None = None
        if trained:
            # fused, as the loop over parameters asks for the value of the number of steps
            self._optimizer = torch.optim.AdamW(
                self._trained, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
            )
            with self._fake:
                for parameter in self._trained:
                    parameter.grad = torch.zeros_like(parameter)

    def forward(self, rows: Tensor) -> Tensor:
        """Zeros (n, dim) for rows (n,), on a CPU."""
        if self._trained and torch.is_grad_enabled():
            return _FakeVectors.apply(torch.zeros((), requires_grad=True), self, len(rows))
        with torch.no_grad():
            self.run(len(rows))
        return torch.zeros(len(rows), self.dim)

    def run(self, count: int) -> Tensor:
        """The encoder's forward pass of so many items, (count, dim) without values."""
        with self.inside():
            tokens = torch.zeros(count, self._num_tokens, dtype=torch.int64)
            images = torch.zeros(count, 3, self._size, self._size, dtype=torch.uint8)
            return self._held[0].encode_table(
                images, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            )

    def update(self) -> None:
        """The optimizer's step of what is trained; nothing where nothing is."""
        if self._optimizer is not None:
            with self.inside():
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=False)

    def weights(self) -> Iterator[Tensor]:
        """Parameters and buffers of the encoder."""
        yield from self._held[0].parameters()
        yield from self._held[0].buffers()

    def training_state(self) -> Iterator[Tensor]:
        """Gradients and state of the optimizer, which have memory between two steps."""
        yield from (parameter.grad for parameter in self._trained if parameter.grad is not None)
        if self._optimizer is not None:
            yield from (x for x in tree_leaves(dict(self._optimizer.state)) if isinstance(x, Tensor))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """New tensors are fake; modes that watch the step see them, and not what fake ones are made of."""
        with _disable_current_modes() as watching, ExitStack() as stack:
            for mode in (self._fake, *watching):
                stack.enter_context(mode)
            yield


class _FakeVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, fake: FakeEncoder, count: int) -> Tensor:
        ctx.fake = fake
        with torch.enable_grad():
            ctx.vectors = fake.run(count)
        return torch.zeros(count, fake.dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        vectors, ctx.vectors = ctx.vectors, None
        with torch.enable_grad(), ctx.fake.inside():
            vectors.backward(torch.ones_like(vectors))
        return None, None, None
