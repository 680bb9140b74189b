"""The losses of Table 4's variants v1 to v3 against loops over items and pairs, and the options for them."""

import math
from pathlib import Path

import pytest
import torch

from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.csft.loss_variant import check_objective, make_variant_loss
from mim_torchrec.csft.main import main
from mim_torchrec.losses.cross_entropy import CategoryCrossEntropy, PairCrossEntropy
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE

N, D, CATEGORIES = 5, 6, 3


def vectors(seed: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def config(**options) -> CSFTConfig:
    return CSFTConfig(data=Path("data"), out=Path("out"), **options)


def test_categories_are_classified_on_every_level():
    torch.manual_seed(0)
    loss = CategoryCrossEntropy(D, CATEGORIES, alpha=0.5, beta=0.25)
    levels = {"mm": vectors(0, N), "text": vectors(1, N), "image": vectors(2, N)}
    categories = torch.tensor([0, 2, 1, 1, 0])
    expected = 0.0
    for name, weight in {"mm": 1.0, "text": 0.5, "image": 0.25}.items():
        layer = loss.classifiers[name]
        for vector, category in zip(levels[name], categories, strict=True):
            logits = [
                float(w.detach() @ vector + b.detach()) for w, b in zip(layer.weight, layer.bias, strict=True)
            ]
            probability = math.exp(logits[category]) / sum(math.exp(logit) for logit in logits)
            expected -= weight * math.log(probability) / N
    total, _ = loss(*levels.values(), categories)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_level_of_no_weight_has_no_classifier():
    assert list(CategoryCrossEntropy(D, CATEGORIES, alpha=0.0, beta=0.1).classifiers) == ["mm", "image"]


def test_one_category_is_nothing_to_classify():
    with pytest.raises(ValueError, match="1 categories"):
        CategoryCrossEntropy(D, 1)


def test_positives_are_told_from_hard_negatives_on_every_level():
    loss = PairCrossEntropy(alpha=0.5, beta=0.25, temperature=0.2)
    with torch.no_grad():
        loss.bias.fill_(-0.3)
    query, levels = vectors(3, N), [vectors(seed, 2 * N) for seed in range(3)]
    expected = 0.0
    for weight, items in zip((1.0, 0.5, 0.25), levels, strict=True):
        for j in range(2 * N):
            a, b = query[j % N], items[j]
            probability = 1 / (1 + math.exp(-(float(a @ b / a.norm() / b.norm()) / 0.2 - 0.3)))
            expected -= weight * math.log(probability if j < N else 1 - probability) / (2 * N)
    total, _ = loss(query, *levels)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_bias_and_the_scale_are_learned():
    loss = PairCrossEntropy()
    loss(vectors(3, N), *[vectors(seed, 2 * N) for seed in range(3)])[0].backward()
    assert loss.bias.grad and loss.log_scale.grad


def test_pairs_without_hard_negatives_are_refused():
    with pytest.raises(ValueError, match="5 queries have 5 items"):
        PairCrossEntropy()(vectors(3, N), vectors(0, N), vectors(1, N), vectors(2, N))


@pytest.mark.parametrize(("loss", "signal", "expected"), [
    ("cross_entropy", "category", CategoryCrossEntropy),
    ("cross_entropy", "click", PairCrossEntropy),
    ("cross_entropy", "purchase", PairCrossEntropy),
    ("contrastive", "click", MultiLevelInfoNCE),
    ("contrastive", "purchase", MultiLevelInfoNCE),
])  # fmt: skip
def test_the_five_variants_of_table_4(loss, signal, expected):
    chosen = config(loss=loss, interest_signal=signal)
    check_objective(chosen)
    assert type(make_variant_loss(chosen, CATEGORIES)) is expected


@pytest.mark.parametrize(("options", "message"), [
    ({"interest_signal": "category"}, "take --loss cross_entropy, or another signal"),
    ({"loss": "cross_entropy", "gamma": 0.5}, "options of --loss contrastive"),
    ({"loss": "cross_entropy", "queue_batches": 1}, "options of --loss contrastive"),
    ({"loss": "cross_entropy", "hard_negatives": False}, "needs --hard-negatives True"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_objective(config(**options))


def test_the_program_refuses_them_before_it_reads_data(tmp_path):
    with pytest.raises(ValueError, match="--loss contrastive needs pairs"):
        main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--interest-signal",
              "category"])  # fmt: skip
    assert not (tmp_path / "out").exists()
