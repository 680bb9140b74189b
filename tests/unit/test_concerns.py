"""Concerns of a finished run, by name."""

import logging

from mim_torchrec.training.concerns import (
    FELL_AFTER_FIRST_EPOCH,
    WORSE_THAN_CONSTANT,
    concerns,
    log_concerns,
)
from mim_torchrec.training.history import History
from tests.said import said


def history(*aucs: float) -> History:
    epochs = [{"epoch": k, "auc": auc} for k, auc in enumerate(aucs)]
    return History(epochs=epochs, best_epoch=aucs.index(max(aucs)))


def test_a_run_that_rises_has_none():
    assert concerns(history(0.6, 0.61, 0.605), "auc", {"validation": 0.99, "test": 1.0}) == {}


def test_an_entropy_above_that_of_a_constant_is_named_with_its_part():
    found = concerns(history(0.6), "auc", {"validation": 0.98, "test": 1.0213})
    assert list(found) == [WORSE_THAN_CONSTANT]
    assert "(test 1.0213)" in found[WORSE_THAN_CONSTANT]


def test_an_entropy_that_is_not_defined_is_no_concern():
    assert concerns(history(0.6), "auc", {"validation": None, "test": None}) == {}


def test_validation_that_falls_after_the_first_epoch_is_named():
    found = concerns(history(0.632, 0.61, 0.6), "auc", {})
    assert list(found) == [FELL_AFTER_FIRST_EPOCH]
    assert "auc 0.6320, then 0.6100" in found[FELL_AFTER_FIRST_EPOCH]


def test_one_epoch_an_equal_one_and_a_later_rise_are_no_fall():
    for aucs in ((0.6,), (0.6, 0.6), (0.6, 0.59, 0.61)):
        assert concerns(history(*aucs), "auc", {}) == {}
    assert concerns(history(0.6, 0.5), None, {}) == {}


def test_each_is_a_line_of_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        log_concerns({"a": "one", "b": "two"})
    assert said(caplog, "training.concerns") == ["a: one", "b: two"]
