"""Images and titles of items to the vectors that the table holds, in one call.

For notebooks and small sets. `mim export` encodes a whole catalog, on several ranks, with decoding ahead.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mim_torchrec.data.images import decode_image
from mim_torchrec.encoders.item_encoder import ItemEncoder

ImageSource = Image.Image | bytes | str | Path
"""A decoded image, the bytes of an image file, or the path of one."""


def encode(
    encoder: ItemEncoder, images: Sequence[ImageSource], titles: Sequence[str], *, batch_size: int = 64
) -> Tensor:
    """Encode items as `mim export` does.

    Args:
        encoder: from `load_encoder`; it runs where its weights are.
        images: one image an item.
        titles: one title an item, in the order of `images`.
        batch_size: items that are encoded at once.

    Returns:
        (num_items, encoder.table_dim) float32 on the CPU: h^MM, and beside it principal components if the
        encoder has them.

    Raises:
        ValueError: there are not as many images as titles, or `batch_size` is below 1.
        RuntimeError: the encoder is in training mode.
        DataError: an image cannot be decoded; the message names it.
        OSError: a file cannot be read.

    >>> from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoderConfig
    >>> from mim_torchrec.encoders.text import TextEncoderConfig, train_tokenizer
    >>> from mim_torchrec.encoders.vision import VisionEncoderConfig
    >>> config = ItemEncoderConfig(
    ...     vision=VisionEncoderConfig(name="test_convnext", weights="random", image_size=32),
    ...     text=TextEncoderConfig(name="bert-tiny", weights="random"),
    ...     head=HeadConfig(dim=8),
    ... )
    >>> titles = ["red wool hat", "blue wool scarf"]
    >>> encoder = ItemEncoder.build(config, train_tokenizer(titles)).eval()
    >>> encode(encoder, [Image.new("RGB", (40, 20), color) for color in ("red", "blue")], titles).shape
    torch.Size([2, 8])
    """
    if len(images) != len(titles):
        raise ValueError(f"{len(images)} images, but {len(titles)} titles: give one of each for every item")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least one item is encoded at once")
    if encoder.training:
        raise RuntimeError("the encoder is in training mode, in which dropout is random: call encoder.eval()")
    device = next(encoder.parameters()).device
    parts = [torch.empty(0, encoder.table_dim)]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = [_open(image, start + k) for k, image in enumerate(images[start : start + batch_size])]
            pixels = torch.stack([encoder.vision.transform(image) for image in batch]).to(device)
            tokens = encoder.text.tokenize(titles[start : start + batch_size])
            tokens = {name: value.to(device) for name, value in tokens.items()}
            parts.append(encoder.encode_table(pixels, tokens).float().cpu())
    # a tensor made in inference mode cannot be saved for a backward pass
    return torch.cat(parts)


def _open(image: ImageSource, place: int) -> Image.Image:
    if isinstance(image, bytes | Image.Image):
        return decode_image(image, f"image {place}")
    return decode_image(Path(image).read_bytes(), str(image))
