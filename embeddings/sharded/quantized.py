"""Frozen tables in TorchRec's quantized inference: the stored rows, in the modules that it serves and shards.

``quantize_inference_model`` replaces a collection by a quantized one if its type is in the mapping, and else
leaves it as it is, without a word. :func:`frozen_quantization_mapping` has both frozen collections. They
become TorchRec's own quantized collections, which its sharders know. Rows keep their type, whatever type
trained tables are quantized to:

==========  ===================================================================================
float32     the same bytes
float16     the same bytes
bfloat16    float32, exactly: TorchRec's inference has no bfloat16 rows
int8        the same codes; scale and bias of a row become float16, which its kernels read
==========  ===================================================================================

Rounding scale and bias moves a vector by at most 2^-9 of its largest value, and most often by less than the
quantization did. Rows whose scale or bias float16 cannot hold are refused.

TorchRec's inference does not raise for a row that does not exist: it looks up row 0 and warns. Sharded by its
default sharders it does not look at all, and reads memory that is not the table's.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
    PoolingMode,
)
from torch import Tensor, nn
from torchrec.distributed.fused_params import (
    FUSED_PARAM_BOUNDS_CHECK_MODE,
    FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
)
from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder
from torchrec.distributed.quant_embeddingbag import QuantEmbeddingBagCollectionSharder
from torchrec.distributed.types import BoundsCheckMode, ModuleSharder
from torchrec.inference.modules import (
    DEFAULT_FUSED_PARAMS,
    DEFAULT_QUANT_MAPPING,
    get_table_to_weights_from_tbe,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.quant import embedding_modules as quant

from mim_torchrec.embeddings.sharded.frozen import (
    FrozenEmbeddingBagCollection,
    FrozenEmbeddingCollection,
    FrozenModule,
    FrozenTable,
)
from mim_torchrec.embeddings.table.quantize import SCALE_AND_BIAS

TYPES = {
    "float32": DataType.FP32,
    "float16": DataType.FP16,
    "bfloat16": DataType.FP32,
    "int8": DataType.INT8,
}
TOLERANCE = 2.0**-9  # of what rounding to float16 may move a vector, relative to its largest value


def frozen_quantization_mapping() -> dict[str, type[nn.Module]]:
    """Return TorchRec's default mapping and the frozen collections, for ``quantize_inference_model``."""
    return {
        **DEFAULT_QUANT_MAPPING,
        torch.typename(FrozenEmbeddingCollection): _Unpooled,
        torch.typename(FrozenEmbeddingBagCollection): _Pooled,
    }


def quantized_sharders(split_scales: bool = False) -> list[ModuleSharder[nn.Module]]:
    """Return sharders for ``shard_quant_model``, for rows of all types; a row that does not exist is row 0.

    Args:
        split_scales: keep the scales of rows apart. TorchRec shards row-wise only so, and float32 and float16
            rows only otherwise; its default sharders are of the first kind.
    """
    fused_params = {
        **DEFAULT_FUSED_PARAMS,
        FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: split_scales,
        FUSED_PARAM_BOUNDS_CHECK_MODE: BoundsCheckMode.WARNING,
    }
    return [
        cast(ModuleSharder[nn.Module], QuantEmbeddingCollectionSharder(fused_params=fused_params)),
        cast(ModuleSharder[nn.Module], QuantEmbeddingBagCollectionSharder(fused_params=fused_params)),
    ]


def nbit_rows(table: FrozenTable) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a table in the layout of TorchRec's inference kernels (IntNBit).

    Returns:
        The vectors' bytes (num_rows, bytes of a vector), and of int8 rows scale and bias (num_rows, 4), two
        float16 numbers as bytes; None for other types.

    Raises:
        ValueError: a scale or bias is not a float16 number, nor near one.
    """
    stored = torch.cat(list(table.store.blocks()))
    if table.dtype == "bfloat16":
        stored = stored.float()
    if table.dtype != "int8":
        return stored.view(torch.uint8), None
    exact = stored[:, -SCALE_AND_BIAS:].contiguous().view(torch.float32)
    rounded = exact.half()
    error = (rounded.float() - exact).abs() @ torch.tensor([255.0, 1.0])
    largest = torch.maximum(exact[:, 1].abs(), (exact[:, 1] + 255 * exact[:, 0]).abs())
    wrong = ~(error <= TOLERANCE * largest)  # also where an infinity makes it NaN
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"frozen table {table.config.name}: row {row} has scale {exact[row, 0]:.3g} and bias "
            f"{exact[row, 1]:.3g}, which TorchRec's int8 rows hold as float16; convert the table: `mim table "
            f"convert TABLE --dtype float32 --out DIR`"
        )
    return stored[:, :-SCALE_AND_BIAS].contiguous(), rounded.view(torch.uint8)


class _Unpooled:
    """What the mapping turns a ``FrozenEmbeddingCollection`` into."""

    @classmethod
    def from_float(cls, module: FrozenEmbeddingCollection, **_: Any) -> quant.EmbeddingCollection:
        return quant.EmbeddingCollection(
            [_config(table) for table in module.frozen_tables().values()],
            need_indices=module.need_indices(),
            **_arguments(module),
        )


class _Pooled:
    """What the mapping turns a ``FrozenEmbeddingBagCollection`` into."""

    @classmethod
    def from_float(cls, module: FrozenEmbeddingBagCollection, **_: Any) -> quant.EmbeddingBagCollection:
        return quant.EmbeddingBagCollection(
            [_config(table) for table in module.frozen_tables().values()],
            is_weighted=module.is_weighted(),
            **_arguments(module),
        )


def copy_quantized_rows(quantized: nn.Module, sharded: nn.Module) -> None:
    """Give a model that ``shard_quant_model`` sharded its rows: TorchRec shards shapes, not rows.

    Args:
        quantized: the model that was sharded; it keeps its rows.
        sharded: what ``shard_quant_model`` made of a copy of it, with ``sharding_device="cpu"`` or another
            device that has memory. Its tables are sharded table-wise or row-wise.

    Raises:
        ValueError: the shards of a table are not its rows in order; or a table whose vectors are averaged is
            sharded row-wise, of which TorchRec's inference would sum the averages of the shards.
    """
    whole = get_table_to_weights_from_tbe(quantized)
    done = dict.fromkeys(whole, 0)
    for module in sharded.modules():
        if not isinstance(module, IntNBitTableBatchedEmbeddingBagsCodegen):
            continue
        for spec, shard in zip(module.embedding_specs, module.split_embedding_weights(), strict=True):
            name, first = spec[0], done[spec[0]]
            done[name] += shard[0].shape[0]
            if module.pooling_mode == PoolingMode.MEAN and shard[0].shape[0] != whole[name][0].shape[0]:
                raise ValueError(
                    f"table {name} is averaged: TorchRec's inference would sum the averages of row-wise "
                    f"shards; shard it table-wise"
                )
            for own, rows in zip(shard, whole[name], strict=True):
                if own is not None:
                    part = rows[first : done[name]]
                    if part.shape != own.shape:
                        raise ValueError(
                            f"table {name}: a shard of shape {tuple(own.shape)} is not rows in order"
                        )
                    own.copy_(part)
    for name, (rows, _) in whole.items():
        if done[name] != rows.shape[0]:
            raise ValueError(f"table {name}: its shards have {done[name]} of {rows.shape[0]} rows")


def _config(table: FrozenTable) -> Any:
    return replace(table.config, data_type=TYPES[table.dtype])


def _arguments(module: FrozenModule) -> dict[str, Any]:
    """What both quantized collections take, as TorchRec's own ``from_float`` finds it on a module."""
    tables = module.frozen_tables()
    return {
        "device": next(iter(tables.values())).store.gather(torch.zeros(0, dtype=torch.int64)).device,
        "output_dtype": module.qconfig.activation().dtype,
        "table_name_to_quantized_weights": {name: nbit_rows(table) for name, table in tables.items()},
        "register_tbes": getattr(module, quant.MODULE_ATTR_REGISTER_TBES_BOOL, False),
        "quant_state_dict_split_scale_bias": getattr(
            module, quant.MODULE_ATTR_QUANT_STATE_DICT_SPLIT_SCALE_BIAS, False
        ),
        "row_alignment": getattr(module, quant.MODULE_ATTR_ROW_ALIGNMENT_INT, quant.DEFAULT_ROW_ALIGNMENT),
        "cache_features_order": getattr(module, quant.MODULE_ATTR_CACHE_FEATURES_ORDER, False),
    }
