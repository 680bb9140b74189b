"""Presets: the paper to the letter, flags that win, and what a run that is resumed is compared by."""

from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

from mim_torchrec.csft import config as csft
from mim_torchrec.ctr import config as ctr
from mim_torchrec.pretraining import config as pretraining
from mim_torchrec.training.presets import differences, replaced

NEEDED = ["--data", "data", "--out", "out"]
STAGES = {"pretrain": pretraining, "csft": csft, "ctr": ctr}


def test_csft_has_the_settings_of_the_paper():
    config = csft.parse([*NEEDED, "--preset", "paper"])
    assert (config.vision.name, config.text.name, config.freeze_towers) == ("eva02", "bge_base", False)
    assert (config.alpha, config.beta, config.gamma, config.temperature) == (0.5, 0.5, 0.0, 1.0)
    assert (config.queue_batches, config.mask_same_item, config.balance_queue) == (10, False, False)
    assert (config.hard_negatives, config.hard_negatives_from) == (True, "items")
    assert (config.lr, config.weight_decay, config.pairs_per_step(40)) == (0.005, 0.0, 40 * 1024)


def test_ctr_has_the_settings_of_the_paper():
    config = ctr.parse([*NEEDED, "--preset", "paper"])
    assert (config.ubm, config.content_pooling, config.content_temperature) == ("sim", "sum", None)
    assert (config.lr, config.sparse_lr, config.sparse_optimizer) == (0.005, 0.005, "adam")
    assert (config.batch_size_per_rank, config.weight_decay, config.id_shrinkage) == (1024, 0.0, 0.0)


def test_pretraining_has_the_settings_of_the_paper():
    config = pretraining.parse([*NEEDED, "--preset=paper"])
    assert config.phases == ("dda-vision", "dda-text", "dma")
    for phase in (config.dda_vision, config.dda_text, config.dma):
        assert (phase.items_per_step(2), phase.lr, phase.head_lr) == (2048, 0.005, 0.005)
    assert (config.dma.temperature, config.dma.mask_same_item) == (None, False)


@pytest.mark.parametrize("name", STAGES)
def test_every_value_of_a_preset_is_that_of_a_flag(name):
    for preset, values in STAGES[name].PRESETS.items():
        found = STAGES[name].parse([*NEEDED, "--preset", preset])
        assert found.preset == preset
        assert differences(found, values) == {}


def test_flags_win_over_the_preset_wherever_they_stand():
    flags = ["--vision.name", "resnet50d", "--preset", "paper", "--queue-batches=2", "--lr", "0.1"]
    config = csft.parse([*NEEDED, *flags])
    assert (config.vision.name, config.queue_batches, config.lr) == ("resnet50d", 2, 0.1)
    assert (config.text.name, config.temperature) == ("bge_base", 1.0)
    assert ctr.parse([*NEEDED, "--preset", "paper", "--ubm", "din"]).ubm == "din"


def test_a_flag_for_the_whole_batch_settles_that_of_a_rank():
    assert csft.parse([*NEEDED, "--preset", "paper", "--batch-size", "64"]).pairs_per_step(2) == 64
    assert ctr.parse([*NEEDED, "--preset", "paper", "--batch-size=64"]).batch_size_per_rank is None
    config = pretraining.parse([*NEEDED, "--preset", "paper", "--dma.batch-size", "64"])
    assert (config.dma.items_per_step(2), config.dda_text.items_per_step(2)) == (64, 2048)


RECOMMENDED = [*NEEDED, "--preset", "recommended"]


def parse_ctr(words: list[str]) -> ctr.CTRConfig:
    """As `mim ctr` does."""
    return ctr.parse(words, config=(tyro.conf.FlagConversionOff,))


@pytest.mark.parametrize(
    "flags",
    [
        ["--id-shrinkage", "0"],
        ["--id-shrinkage=0.0"],
        ["--batch-norm", "False"],
        ["--normalize-ids", "False"],
    ],
    ids=" ".join,
)
def test_where_a_flag_leaves_no_shrinkage_to_keep_the_preset_keeps_none(flags):
    config = parse_ctr([*RECOMMENDED, *flags])
    assert not config.keep_shrinkage and config.id_shrinkage == (0 if "shrink" in flags[0] else 60)
    asked = parse_ctr([*RECOMMENDED, *flags, "--keep-shrinkage", "True"])
    assert asked.keep_shrinkage  # which building the model refuses, see test_keep_shrinkage.py


@pytest.mark.parametrize(
    "flags",
    [[], ["--mim", "off"], ["--id-shrinkage", "30"], ["--batch-norm", "True"], ["--normalize-ids=True"],
     ["--id-shrinkage", "0", "--id-shrinkage-of", "user_id", "9"]],
    ids=" ".join,
)  # fmt: skip
def test_where_there_is_shrinkage_the_preset_keeps_it(flags):
    assert parse_ctr([*RECOMMENDED, *flags]).keep_shrinkage
    assert not parse_ctr([*RECOMMENDED, *flags, "--keep-shrinkage", "False"]).keep_shrinkage


def test_the_preset_is_the_flags_given_by_hand():
    by_hand = ["--content-pooling", "mean", "--dot-product-features", "True", "--similarity-interest", "True",
               "--id-shrinkage", "60", "--keep-shrinkage", "True", "--lr", "0.001"]  # fmt: skip
    assert parse_ctr(RECOMMENDED).resume_fingerprint() == parse_ctr([*NEEDED, *by_hand]).resume_fingerprint()


def test_towers_of_an_earlier_stage_stand_in_for_those_of_the_preset():
    for stage in (csft, pretraining):
        config = stage.parse([*NEEDED, "--preset", "paper", "--towers", "runs/pretrain/towers"])
        default = stage.parse(NEEDED)
        assert (config.vision, config.text) == (default.vision, default.text)


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_preset_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        STAGES[name].parse([*NEEDED, "--preset", "best"])
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGES)
def test_a_run_is_compared_by_the_values_that_it_used_and_not_by_the_name_of_the_preset(name):
    stage = STAGES[name]
    paper, plain = (stage.parse([*NEEDED, "--preset", preset]) for preset in ("paper", "default"))
    assert paper.resume_fingerprint() != plain.resume_fingerprint()
    assert asdict(paper)["preset"] == "paper"
    by_hand = replaced(stage.parse(["--data", "data", "--out", "elsewhere"]), asdict_of(stage, paper))
    assert by_hand.preset == "default"
    assert by_hand.resume_fingerprint() == paper.resume_fingerprint()


def asdict_of(stage, config) -> dict:
    """The values of the preset; a user behavior model brings its own options."""
    values = dict(stage.PRESETS["paper"])
    return values | ({"ubm_options": config.ubm_options} if "ubm" in values else {})


def test_a_nested_value_of_what_has_no_fields_is_an_error():
    with pytest.raises(AttributeError, match="out of CSFTConfig has no fields"):
        replaced(csft.CSFTConfig(data=Path("data"), out=Path("out")), {"out.name": 1})
