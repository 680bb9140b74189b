"""What a report says of two models, and that its pages say it."""

import io
import json
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_torchrec.benchmarks.harness import comparison
from mim_torchrec.benchmarks.harness.experiment_report import _draw_validation, loss_curve, write_report
from mim_torchrec.benchmarks.harness.moved_clicks import moved_clicks
from mim_torchrec.data.schema import Dataset
from mim_torchrec.training.history import read_history
from mim_torchrec.training.metrics import auc
from tests.datasets import SECOND, START, item_rows, open_items, request_rows, write_requests

IMPRESSIONS = 2000


def ctr_run(path, seed, signal, order=None, labels=None):
    """A directory as the CTR stage leaves it; `signal` is how much the scores know of the labels."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=IMPRESSIONS) if labels is None else labels
    users = rng.integers(40, size=IMPRESSIONS)
    noise = np.random.default_rng(seed + 1000).normal(size=IMPRESSIONS)
    scores = 1 / (1 + np.exp(-(noise + signal * truth)))
    predictions = pa.table(
        {
            "request_id": np.arange(IMPRESSIONS) // 4,
            "user_id": users,
            "item_id": np.arange(IMPRESSIONS),
            "label": truth.astype(np.float32),
            "score": scores.astype(np.float32),
        }
    )
    path.mkdir(parents=True)
    pq.write_table(predictions if order is None else predictions.take(order), path / "predictions.parquet")
    part = {"auc": auc(truth, scores), "n": IMPRESSIONS, "positives": int(truth.sum())}
    ages = [{"set": f"S{k}", **part} for k in range(1, 11)]
    ages[3] = {"set": "S4", "auc": None, "n": 0, "positives": 0}
    table = {"rows": 1234, "dim": 128, "dtype": "float16", "table_version": "abc", "digest_before": "d",
             "digest_after": "d"}  # fmt: skip
    metrics = {"auc": part["auc"], "gauc": 0.6, "ne": 0.9, "logloss": 0.5, "n": IMPRESSIONS, "by_age": ages,
               "by_category": {"few": {**part, "n": 3}, "<b>many</b>": part}, "table": table}  # fmt: skip
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


@pytest.fixture
def runs(tmp_path):
    return (
        [ctr_run(tmp_path / f"base{s}", s, 0.5) for s in range(3)],
        [ctr_run(tmp_path / f"mim{s}", s + 10, 0.8) for s in range(3)],
    )


def test_the_gain_is_the_mean_over_the_seeds(runs):
    result = comparison.gain(*runs, n=50)
    expected = [
        b["auc"] - a["auc"] for a, b in zip(*(comparison.read_metrics(side) for side in runs), strict=True)
    ]
    assert result["per_seed"] == pytest.approx(expected, abs=1e-5)  # the files hold scores in fp32
    assert result["gain"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_gain_on_some_items_is_that_of_their_impressions(runs):
    items = np.arange(0, IMPRESSIONS, 3)
    result = comparison.gain(*runs, n=50, items=items)
    for base, mim, found in zip(*runs, result["per_seed"], strict=True):
        rows = [pq.read_table(run / "predictions.parquet").to_pandas() for run in (base, mim)]
        first, second = (r[r.item_id.isin(items)] for r in rows)
        expected = auc(second.label, second.score) - auc(first.label, first.score)
        assert found == pytest.approx(expected)
    assert result["gain"] == pytest.approx(np.mean(result["per_seed"]))
    assert result["ci"][0] < result["gain"] < result["ci"][1]


def test_items_without_a_click_have_no_gain(runs):
    rows = pq.read_table(runs[0][0] / "predictions.parquet").to_pydict()
    item = rows["item_id"][rows["label"].index(0)]
    assert comparison.gain(*runs, items=np.array([item])) == {"gain": None, "ci": None, "per_seed": None}


def test_the_interval_resamples_users_and_takes_the_mean_over_seeds(runs):
    low, high = comparison.gain(*runs, n=200)["ci"]
    base, mim = ([pq.read_table(run / "predictions.parquet").to_pydict() for run in side] for side in runs)
    labels, users = np.array(base[0]["label"]), np.array(base[0]["user_id"])
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(200):
        rows = np.concatenate([np.flatnonzero(users == u) for u in rng.integers(40, size=40)])
        draws.append(
            np.mean(
                [
                    auc(labels[rows], np.array(m["score"])[rows])
                    - auc(labels[rows], np.array(b["score"])[rows])
                    for b, m in zip(base, mim, strict=True)
                ]
            )
        )
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.006)


def test_impressions_may_be_stored_in_any_order(tmp_path):
    base = ctr_run(tmp_path / "base", 0, 0.5)
    mim = ctr_run(tmp_path / "mim", 1, 0.8)
    shuffled = ctr_run(tmp_path / "shuffled", 1, 0.8, order=np.random.default_rng(5).permutation(IMPRESSIONS))
    assert comparison.gain([base], [shuffled], n=20) == comparison.gain([base], [mim], n=20)


def test_runs_on_other_impressions_are_refused(tmp_path):
    base = ctr_run(tmp_path / "base", 0, 0.5)
    other = ctr_run(tmp_path / "other", 1, 0.8, labels=np.arange(IMPRESSIONS) % 2)
    with pytest.raises(ValueError, match="other and .*base differ in"):
        comparison.gain([base], [other])


@pytest.mark.parametrize(
    ("signal", "contains_zero", "words"),
    [(0.5, True, "vanishes"), (1.5, False, "lies above zero"), (-0.5, False, "lies below zero")],
)
def test_a_control_says_where_its_interval_lies(tmp_path, signal, contains_zero, words):
    base = ctr_run(tmp_path / "base", 0, 0.5)
    result = comparison.control("", [base], [ctr_run(tmp_path / "control", 0, signal)])
    assert result["contains_zero"] is contains_zero
    assert words in result["verdict"]


def test_a_control_of_one_class_of_labels_is_undefined(tmp_path):
    runs = [ctr_run(tmp_path / name, 0, 0.5, labels=np.zeros(IMPRESSIONS)) for name in ("base", "control")]
    result = comparison.control("", runs[:1], runs[1:])
    assert (result["gain"], result["ci"], result["contains_zero"]) == (None, None, None)
    assert result["verdict"].startswith("undefined")
    assert not comparison.target_of_gain("it gains", result)["met"]


def test_an_undefined_figure_stays_undefined_in_the_mean(runs):
    sets = comparison.cold_start(*runs)
    assert [s["set"] for s in sets] == [f"S{k}" for k in range(1, 11)]
    assert sets[3]["base_auc"] is None and sets[3]["mim_auc"] is None
    assert sets[0]["mim_auc"] > sets[0]["base_auc"]


def test_items_by_age_have_intervals_where_the_items_are_known(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "gain", partial(comparison.gain, n=20))
    rows = [{**item_rows(1)[0], "item_id": k, "listed_at": START - k * SECOND} for k in range(IMPRESSIONS)]
    sets = comparison.cold_start(*runs, open_items(tmp_path / "items", rows))
    tenth = IMPRESSIONS // 10
    for k in (0, 9):
        expected = comparison.gain(*runs, items=np.arange(k * tenth, (k + 1) * tenth))
        assert {name: sets[k][name] for name in expected} == expected
        assert sets[k]["ci"][0] < sets[k]["gain"] < sets[k]["ci"][1]


def test_the_clicks_that_content_moved_up_most_are_shown(tmp_path):
    """Of three requests MIM moves one click from 3 to 1, one from 2 to 1, and one down."""
    labels, users = [0, 0, 1, 0, 1, 0, 1, 0, 0], [5, 5, 5, 6, 6, 6, 7, 7, 7]
    for name, scores in (("base", [9, 8, 7, 9, 8, 7, 9, 8, 7]), ("mim", [8, 7, 9, 8, 9, 7, 7, 8, 9])):
        table = pa.table({"request_id": np.repeat([1, 2, 3], 3), "user_id": users,
                          "item_id": np.arange(100, 109), "label": np.array(labels, np.float32),
                          "score": np.array(scores, np.float32)})  # fmt: skip
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "predictions.parquet")
    rows = [{**row, "behavior_item_ids": [103, 104], "behavior_categories": ["a", "a"],
             "behavior_ts": [row["ts"]] * 2} for row in request_rows(3)]  # fmt: skip
    write_requests(tmp_path / "requests" / "test" / "part-0.parquet", rows)
    items, dataset = open_items(tmp_path), Dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    strips = moved_clicks(tmp_path / "base", tmp_path / "mim", dataset, items)
    assert [strip.caption for strip in strips] == [
        "item 2: rank 3 of 3 by Base, 1 by MIM", "item 4: rank 2 of 3 by Base, 1 by MIM",
    ]  # fmt: skip
    assert [alt for _, alt in strips[0].pictures] == ["item 3", "item 4", "item 2"]
    assert all(Image.open(io.BytesIO(data)).size == (96, 96) for data, _ in strips[0].pictures)
    assert len(moved_clicks(tmp_path / "base", tmp_path / "mim", dataset, items, count=1)) == 1


def test_an_epoch_ends_at_its_last_step(tmp_path):
    lines = [{"step": 1, "epoch": 0, "loss": 2.0}, {"step": 2, "epoch": 0, "loss": 1.5},
             {"epoch": 0, "loss": 1.75, "ne": 0.9, "is_best": True}, {"step": 3, "epoch": 1, "loss": 1.0},
             {"epoch": 1, "loss": 1.0, "ne": 0.8, "is_best": True}]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert loss_curve(tmp_path / "history.jsonl")["epoch_step"] == [2, 3]


def test_epochs_whose_lines_a_crash_has_lost_are_left_out_of_the_curve(tmp_path):
    lines = [{"epoch": 1, "loss": 1.75, "ne": 0.9, "is_best": True}, {"step": 5, "epoch": 2, "loss": 1.0},
             {"epoch": 2, "loss": 1.0, "ne": 0.8, "is_best": True}]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = loss_curve(tmp_path / "history.jsonl")
    assert curve["epoch_step"] == [None, 5]
    axes = plt.figure().subplots()
    _draw_validation(axes, curve)
    drawn, best = axes.figure.axes[1].lines
    assert drawn.get_xydata().tolist() == best.get_xydata().tolist() == [[5, 0.8]]
    plt.close(axes.figure)
    assert read_history(tmp_path / "history.jsonl").best()["epoch"] == 2


def test_a_long_loss_curve_is_averaged_to_few_points(tmp_path):
    steps = [{"step": k, "epoch": 0, "loss": float(k)} for k in range(1, 1001)]
    lines = [*steps, {"epoch": 0, "loss": 500.5, "is_best": True}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = loss_curve(tmp_path / "history.jsonl")
    assert len(curve["step"]) == len(curve["loss"]) == 200
    assert np.mean(curve["loss"]) == pytest.approx(500.5)


def full_report(runs):
    control = comparison.control("Vectors permuted.", runs[0], runs[0])
    return {
        "title": "Demo",
        "summary": "A shop.",
        **comparison.compare(*runs),
        "stages": {"shop": 3.2, "csft": 200.0},
        "controls": {"permuted": control},
        "targets": [
            comparison.target("MIM gains", 0.05, True),
            comparison.target("Base reaches 0.999", 0.7, False),
        ],
        "curves": {
            "csft": {"step": [1, 2], "loss": [3.0, 1.0], "epochs": [], "epoch_step": [], "best_epoch": None},
            "ctr": {
                "step": [1, 2],
                "loss": [3.0, 1.0],
                "epochs": [{"epoch": 0, "ne": 0.9}, {"epoch": 1, "ne": 0.95}],
                "epoch_step": [1, 2],
                "best_epoch": 0,
            },
        },
        "config": {"seed": 0},
        "notes": ["Towers are frozen."],
        "seeds": [{"seed": 0, "base_auc": 0.61, "mim_auc": 0.7, "gain": 0.09}],
        "variants": {
            "plain": {"what": "No C-SFT.", "base_auc": 0.6, "auc": 0.65, "gain": 0.05, "ci": [0.01, 0.09]}
        },  # fmt: skip
        "tuning": {
            "how": "On validation.",
            "grid": [
                {
                    "setting": {"lr": 0.001},
                    "base": 0.7,
                    "mim": 0.8,
                    "chosen_for_base": True,
                    "chosen_for_mim": False,
                }
            ],
        },  # fmt: skip
    }


def test_report_json_has_the_promised_keys(runs, tmp_path):
    write_report(full_report(runs), tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    for model in ("base", "mim"):
        assert {"auc", "gauc", "ne"} <= report["ctr"][model].keys()
    assert report["ctr"]["mim_minus_base_auc"] > 0
    assert len(report["ctr"]["mim_minus_base_ci"]) == 2
    assert len(report["cold_start"]) == 10
    assert {"set", "base_auc", "mim_auc"} <= report["cold_start"][0].keys()
    assert {"rows", "dim", "dtype", "table_version"} <= report["table"].keys()
    assert report["versions"]["torch"] and report["hardware"]["cores"] and report["date"]


def test_the_pages_hold_the_figures_and_the_verdicts(runs, tmp_path):
    made = write_report(full_report(runs), tmp_path)
    for page in ("report.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert f"{made['ctr']['mim_minus_base_auc']:+.4f}" in text
        assert "Base reaches 0.999" in text and "contains zero" in text and "1,234" in text
    assert "| 0 | 0.6100 | 0.7000 | +0.0900 |" in (tmp_path / "report.md").read_text()


def test_the_html_page_needs_no_other_file_and_escapes_what_it_shows(runs, tmp_path):
    write_report(full_report(runs), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.split("</style>")[1]
    assert "<b>many</b>" not in page and "&lt;b&gt;many&lt;/b&gt;" in page


def test_a_figure_that_is_not_finite_is_refused(runs, tmp_path):
    report = full_report(runs)
    report["ctr"]["mim"]["auc"] = float("nan")
    with pytest.raises(ValueError):
        write_report(report, tmp_path / "report")
    assert not (tmp_path / "report").exists()
