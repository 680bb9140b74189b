"""Makes deepctr_torch.json: inputs, weights and outputs of DIN's attention and AUGRU in deepctr-torch 0.3.0.

    pip download --no-deps deepctr-torch==0.3.0 && unzip deepctr_torch-0.3.0-*.whl -d FOLDER
    PYTHONPATH=FOLDER python tests/oracles/make_deepctr_torch.py

deepctr-torch is no dependency: tests read the file.
"""

import json
from pathlib import Path

import torch
from deepctr_torch import __version__
from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer, DynamicGRU
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

DIM, HIDDEN = 4, (6, 5)
LENGTHS = torch.tensor([3, 1, 5])


def listed(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: tensor.detach().tolist() for name, tensor in tensors.items()}


def padded(width: int) -> tuple[Tensor, Tensor]:
    """Random rows for each position, padded, and one after the other."""
    rows = torch.randn(len(LENGTHS), int(LENGTHS.max()), width)
    return rows, torch.cat([row[:n] for row, n in zip(rows, LENGTHS.tolist(), strict=True)])


def din() -> dict[str, list]:
    """DIN's attention with Dice; its statistics are made uneven, since evaluation uses them."""
    layer = AttentionSequencePoolingLayer(HIDDEN, "dice", embedding_dim=DIM)
    unit = layer.local_att
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = {}
    linears = [*unit.dnn.linears, unit.dense]
    for k, linear in enumerate(linears):
        weights |= {f"weight_{k}": linear.weight, f"bias_{k}": linear.bias}
    for k, dice in enumerate(unit.dnn.activation_layers):
        torch.nn.init.normal_(dice.bn.running_mean)
        torch.nn.init.uniform_(dice.bn.running_var, 0.5, 2)
        weights |= {f"slope_{k}": dice.alpha.squeeze(), f"mean_{k}": dice.bn.running_mean}
        # its batch norm has a scale of 1, a shift of 0, and another epsilon than ours
        torch.nn.init.ones_(dice.bn.weight)
        torch.nn.init.zeros_(dice.bn.bias)
        weights[f"variance_{k}"] = dice.bn.running_var + dice.bn.eps
    layer.eval()
    candidates = torch.randn(len(LENGTHS), 1, DIM)
    histories, behaviors = padded(DIM)
    interest = layer(candidates, histories, LENGTHS[:, None])
    return listed({"candidates": candidates[:, 0], "behaviors": behaviors, "lengths": LENGTHS,
                    "interest": interest[:, 0], **weights})  # fmt: skip


def augru() -> dict[str, list]:
    layer = DynamicGRU(DIM, HIDDEN[0], gru_type="AUGRU")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    histories, inputs = padded(DIM)
    scores, _ = padded(1)
    scores = scores.squeeze(-1).sigmoid()
    attention = torch.cat([row[:n] for row, n in zip(scores, LENGTHS.tolist(), strict=True)])
    packed = [pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
              for x in (histories, scores)]  # fmt: skip
    out = layer(*packed)
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(PackedSequence(*out), batch_first=True)
    last = states[torch.arange(len(LENGTHS)), LENGTHS - 1]
    # bias_ih and bias_hh are one parameter there
    weights = {name: getattr(layer.rnn, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    return listed({"inputs": inputs, "attention": attention, "lengths": LENGTHS, "last_states": last,
                    **weights})  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    record = {"made_by": f"deepctr-torch {__version__}, torch {torch.__version__}", "din": din(),
              "augru": augru()}  # fmt: skip
    Path(__file__).with_name("deepctr_torch.json").write_text(json.dumps(record) + "\n")
