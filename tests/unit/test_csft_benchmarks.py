"""The programs around C-SFT: which models run together, what is left out, and what a table says plainly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mim_torchrec.benchmarks.paper import ablation_csft, figure5
from mim_torchrec.benchmarks.paper.ablation_csft import TABLES, TRAINED, exchange, line, other_orders
from mim_torchrec.benchmarks.paper.figure5 import Figure5Config, Tower, build_text, build_vision, pairs_of
from mim_torchrec.csft import config as csft_config
from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.csft.loss_variant import check_objective
from mim_torchrec.csft.main import main as csft
from mim_torchrec.ctr import config as ctr
from mim_torchrec.pretraining import config as pretraining
from tests.programs import words


@pytest.mark.parametrize(("words", "tower"), [
    ("swin_tiny@96", Tower("swin_tiny", 96)),
    ("bge_base=models/bge", Tower("bge_base", None, "models/bge")),
    ("test_vit@32=random", Tower("test_vit", 32, "random")),
])  # fmt: skip
def test_towers_are_read_from_words(words, tower):
    assert Tower.parse(words) == tower


def test_every_model_runs_with_the_first_of_the_other_kind():
    config = Figure5Config(vision=("a", "b@32"), text=("x", "y", "z"))
    names = [(v.name, t.name) for v, t in pairs_of(config)]
    assert names == [("a", "x"), ("b", "x"), ("a", "y"), ("a", "z")]
    assert len(pairs_of(Figure5Config(vision=("a", "b"), text=("x", "y", "z"), all_pairs=True))) == 6


def test_a_model_without_local_weights_is_run_forward_with_random_ones(tmp_path):
    vision = build_vision(Tower("test_vit", 32, str(tmp_path / "none.pth")))
    assert "no such file" in vision.problem and vision.cost.parameters > 0 and vision.cost.gflops > 0
    text = build_text(Tower("bert", weights=str(tmp_path)), 4)
    assert "cannot be loaded" in text.problem and text.cost.parameters > 1e8


def test_a_model_with_weights_has_no_problem():
    assert build_vision(Tower("test_vit", 32, "random")).problem is None
    assert build_text(Tower("bert-tiny", weights="random"), 8).problem is None


def test_a_model_whose_vectors_are_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(figure5.VisionEncoder, "forward", lambda self, images: torch.full((1, 64), torch.nan))
    with pytest.raises(RuntimeError, match="not finite"):
        build_vision(Tower("test_vit", 32, "random"))


@pytest.mark.parametrize("scale", ablation_csft.SCALES)
@pytest.mark.parametrize("name", TRAINED)
def test_every_version_is_a_configuration_that_c_sft_takes(name, scale, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("mim_torchrec.csft.main.fine_tune", lambda config, ranks: taken.append(config))
    options = ablation_csft.SCALES[scale].csft | TRAINED[name]
    csft(words(Path("x"), tmp_path, {name: str(value) for name, value in options.items()}))
    assert isinstance(taken[0], CSFTConfig)
    assert taken[0].freeze_towers == (scale == "frozen")
    check_objective(taken[0])


def test_at_the_scale_of_the_paper_every_stage_is_the_papers_and_all_are_seen(tmp_path):
    job = ablation_csft.Job(ablation_csft.AblationConfig(out=tmp_path, towers="paper"))
    scale = job.scale
    assert scale.pretrain["preset"] == scale.csft["preset"] == scale.ctr["preset"] == "paper"
    assert pretraining.parse(flags(scale.pretrain, tmp_path)).dma.batch_size_per_rank == 1024
    assert ctr.parse([*flags(scale.ctr, tmp_path), "--mim", "off"]).ubm == "sim"
    found = csft_config.parse(flags(scale.csft, tmp_path))
    assert (found.batch_size_per_rank, found.queue_batches, found.vision.name) == (1024, 10, "eva02")
    assert found.validation_fraction == ablation_csft.HELD_OUT


def flags(options: dict, out: Path) -> list[str]:
    return words(Path("x"), out, {name: str(value) for name, value in options.items()})


class Ended:
    """A job whose runs are over: AUC of Base 0.70, of others as the test says, one value a seed."""

    def __init__(self, auc: dict[str, list[float]], recall: dict[str, float]) -> None:
        self.config = ablation_csft.AblationConfig(seeds=(0, 1))
        self._auc, self._recall = auc, recall

    def auc(self, name):
        return np.array(self._auc.get(name, [0.71, 0.72]))

    def recall(self, name, seed):
        return {"recall_at_10": self._recall.get(name, 0.1), "mean_rank": 30.0}


def test_a_line_has_mean_deviation_and_the_papers_difference():
    job = Ended({"plain": [0.71, 0.73]}, {"plain": 0.25})
    row = line(job, TABLES["table3"][0], np.array([0.70, 0.70]))
    assert row["auc_mean"] == pytest.approx(0.72)
    assert row["auc_std"] == pytest.approx(np.std([0.71, 0.73], ddof=1))
    assert row["delta"] == pytest.approx(0.02)
    assert (row["paper_delta"], row["recall_at_10"]) == (0.0006, 0.25)


def test_an_order_that_differs_from_the_papers_is_said():
    def row(version: str, auc: float, paper: float) -> dict:
        return {"version": version, "auc_mean": auc, "paper_auc": paper, "delta_std": 0.001}

    assert other_orders([row("a", 0.70, 0.71), row("b", 0.71, 0.72)]) == ["The order is the paper's."]
    said = other_orders([row("a", 0.72, 0.71), row("b", 0.70, 0.72), row("c", 0.7195, 0.705)])
    assert len(said) == 2
    assert said[0].startswith("a is above b here by 0.0200, beyond one standard deviation")
    assert said[1].startswith("c is above b")


def test_the_exchange_rate_is_told_for_c_sft_and_for_all():
    names = [*TRAINED, "plain", "dda", "dma"]
    recall = {name: 0.1 + 0.01 * k for k, name in enumerate(names)}
    auc = {name: [0.70 + 0.5 * recall[name]] * 2 for name in names}
    found = exchange(Ended(auc, recall), np.array([0.70, 0.70]))
    assert found["csft"]["n"] == 2 * len(TRAINED) and found["all"]["n"] == 2 * len(names)
    assert found["all"]["auc_per_point"] == pytest.approx(0.005)
