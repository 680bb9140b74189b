"""Files of tensors (safetensors): written as any other file of the package, and read or refused by name."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mim_torchrec.embeddings.files import atomic_file
from mim_torchrec.errors import ExpectedError


class DamagedFile(ExpectedError, ValueError):
    """A file is cut off, or of another kind than its name says."""


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file, without a copy of the tensors in memory.

    The library's own writer ignores the umask and hides the errors of the disk. The bytes are the same: the
    library lays out the header of tensors without elements, which gets the shapes here.
    """
    template = safetensors.torch.save(
        {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}, metadata
    )
    header = json.loads(template[8 : 8 + int.from_bytes(template[:8], "little")])
    names = [name for name in header if name in tensors]
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, 8 + len(text) + end) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name.

    Raises:
        DamagedFile: it is cut off, or no such file.
    """
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        problem = f"{path} is damaged, or no safetensors file ({error})"
        raise DamagedFile(f"{problem}; copy or write it again, or delete it if it is of a cache") from error
