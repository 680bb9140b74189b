"""A simulated online test of MIM against Base: `make abtest`.

Section 4.7 and Table 7 of the paper, on a synthetic shop whose true click probabilities are known: both
models rank the same requests, users click by the truth, sellers pay by the click. No users were there: it
says what a gain in offline AUC is worth in this shop, not in another.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from scipy.stats import pearsonr

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import deviation
from mim_torchrec.benchmarks.harness.drawing import MIM_COLOR, subplots, tidy, to_png
from mim_torchrec.benchmarks.harness.pages import Section, write_pages
from mim_torchrec.benchmarks.harness.stages import Run
from mim_torchrec.benchmarks.paper import data_sets, shop
from mim_torchrec.benchmarks.paper.auction import Outcome, Traffic, lifts, outcome, rank
from mim_torchrec.benchmarks.paper.model_runs import Model, ModelRuns
from mim_torchrec.benchmarks.paper.shop import ShopSizes
from mim_torchrec.training.metrics import group_codes

BASE, MIM = "base", "mim"
VARIANTS = {"without-content": {"content-interest": False}, "without-fusion": {"fusion-interest": False},
            "similarity": {"similarity-interest": True}}  # fmt: skip
"""Models beside Base and MIM, for how the gain in AUC goes with the lift."""
PAPER_RELEASE = {"auc_gain": 0.0038, "ctr_lift": 0.05, "rpm_lift": 0.01}
"""Table 7, all categories: one release of MIM in Taobao's sponsored search."""
PAPER_TOTAL = {"auc_gain": 0.0081, "ctr_lift": 0.1414, "rpm_lift": 0.0412}
"""Section 4.7: three releases in total."""


@dataclass(frozen=True, kw_only=True)
class ABTestConfig:
    """Rank the requests of a shop by Base and by MIM, simulate what users do, and write a report."""

    out: Path = Path("runs/abtest")
    """Directory of the run; a run that was interrupted there resumes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the CTR models; the test takes them all together."""
    ubm: str = "sim"
    """User behavior model; the paper's is SIM."""
    shop: ShopSizes = ShopSizes(requests=10_000, candidates=20)
    """The synthetic shop; its seed is not that of training."""
    slots: int = 4
    """Candidates of a request that are shown."""
    examination: float = 0.85
    """Probability that a user who has looked at a slot looks at the next; 1 is no position bias."""
    rank_by: Literal["ecpm", "ctr"] = "ecpm"
    """Rank by predicted click rate times bid, or by the click rate alone."""
    repeats: int = 20
    """Times the clicks of the test requests are drawn."""
    draws: int = 1000
    """Bootstrap draws of users for the intervals."""
    jobs: int = 2
    """CTR runs side by side, one process and one thread each."""


class Test:
    """Outcomes of the models on the traffic.

    Args:
        config: of the test.
        traffic: the requests.
        runs: trained models.
    """

    def __init__(self, config: ABTestConfig, traffic: Traffic, runs: ModelRuns) -> None:
        self._config, self._traffic = config, traffic
        self._users = group_codes(traffic.user_id)[0]
        self._shown = {
            name: [
                rank(traffic, traffic.scores(path), config.rank_by, config.slots, config.examination)
                for path in paths
            ]
            for name, paths in runs.runs.items()
        }

    def expected(self, name: str, kept: np.ndarray | None = None) -> list[Outcome]:
        """Expectations of a model, a seed each."""
        return [outcome(self._traffic, shown, self._users, None, kept) for shown in self._shown[name]]

    def drawn(self, name: str, kept: np.ndarray | None = None) -> list[Outcome]:
        """Draws of a model, `repeats` for each seed."""
        place = list(self._shown).index(name)
        return [
            outcome(self._traffic, shown, self._users, np.random.default_rng((seed, place, k)), kept)
            for seed, shown in enumerate(self._shown[name]) for k in range(self._config.repeats)
        ]  # fmt: skip

    def lifts(self, name: str, kept: np.ndarray | None = None, seed: int | None = None) -> dict[str, Any]:
        """Lifts of a model over Base in expectation, of all seeds or of one."""
        chosen = slice(None) if seed is None else slice(seed, seed + 1)
        base, other = (self.expected(model, kept)[chosen] for model in (BASE, name))
        return lifts(base, other, self._config.draws if seed is None else 0, seed=0)


def by_category(test: Test, traffic: Traffic, runs: ModelRuns, config: ABTestConfig) -> dict[str, Any]:
    """Table 7: lifts by the category of what is shown, and the gain in AUC there; most impressions first."""
    base, mim = (runs.metrics(name) for name in (BASE, MIM))
    names, counts = np.unique(traffic.category, return_counts=True)
    found = {}
    for name in names[np.argsort(-counts)]:
        gains = [m["by_category"][name]["auc"] - b["by_category"][name]["auc"]
                 for b, m in zip(base, mim, strict=True)]  # fmt: skip
        found[str(name)] = {"auc_gain": float(np.mean(gains)), **test.lifts(MIM, traffic.category == name)}
    return found


def relation(test: Test, runs: ModelRuns) -> dict[str, Any]:
    """Gain in AUC and lift of every model and seed, and the line through them."""
    points = []
    for name in (MIM, *VARIANTS):
        for k, seed in enumerate(runs.seeds):
            gain = runs.auc(name)[k] - runs.auc(BASE)[k]
            found = test.lifts(name, seed=k)
            points.append({"model": name, "seed": seed, "auc_gain": gain,
                           "ctr_lift": found["ctr_lift"], "rpm_lift": found["rpm_lift"]})  # fmt: skip
    gains, ctr = (np.array([point[key] for point in points]) for key in ("auc_gain", "ctr_lift"))
    distinct = len(points) > 2 and np.ptp(gains) > 0 and np.ptp(ctr) > 0
    return {
        "points": points,
        "ctr_lift_per_auc_point": float(np.polyfit(gains, ctr, 1)[0] / 100) if distinct else None,
        "pearson": float(pearsonr(gains, ctr).statistic) if distinct else None,
    }


def draw(points: Sequence[dict[str, Any]]) -> bytes:
    """Lift over gain, a point a run."""
    figure, axes = subplots(figsize=(6, 3.6))
    for name in dict.fromkeys(point["model"] for point in points):
        mine = [point for point in points if point["model"] == name]
        axes.scatter([p["auc_gain"] for p in mine], [p["ctr_lift"] for p in mine], s=26, label=name,
                     color=MIM_COLOR if name == MIM else None)  # fmt: skip
    axes.set_xlabel("gain in offline AUC over Base", fontsize=9)
    axes.set_ylabel("lift in click rate", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return to_png(figure)


def sections(report: dict[str, Any], config: ABTestConfig) -> list[Section]:
    """The tables of the report."""
    paper = {"paper, Table 7: one release, Taobao": PAPER_RELEASE, "paper: three releases": PAPER_TOTAL}
    rows = [
        ["here, in expectation", f"{report['auc_gain']:+.4f}", *_lifts(report)],
        [f"here, clicks drawn {config.repeats} times", f"{report['auc_gain']:+.4f}",
         *_lifts(report["drawn"])],
        *(
            [name, f"{f['auc_gain']:+.4f}", f"{f['ctr_lift']:+.2%}", f"{f['rpm_lift']:+.2%}"]
            for name, f in paper.items()
        ),
    ]  # fmt: skip
    ranked = "predicted click rate times bid" if config.rank_by == "ecpm" else "predicted click rate"
    text = [
        f"{config.shop.candidates} candidates a request, ranked by {ranked}, {config.slots} shown; a user "
        f"looks at the next slot with probability {config.examination}, clicks by the true probability, and "
        "the seller pays the generalized second price. Intervals are by resampling users, whose requests "
        "both have ranked."
    ]
    related = report["relation"]
    said = "too few runs to say" if related["pearson"] is None else (
        f"a point of AUC (0.01) goes with {related['ctr_lift_per_auc_point']:+.1%} of click rate, Pearson "
        f"{related['pearson']:+.2f} over {len(related['points'])} runs"
    )  # fmt: skip
    return [
        Section("Lift of MIM over Base", text=text, rows=rows,
                columns=["", "AUC gain", "click rate", "revenue a thousand impressions"]),
        Section("By category of what is shown", columns=["category", "AUC gain", "click rate", "revenue"],
                rows=[[name, f"{f['auc_gain']:+.4f}", *_lifts(f)]
                      for name, f in report["by_category"].items()]),
        Section("Gain in AUC and lift", text=[f"In this shop {said}."], images=["relation.png"],
                columns=["model", "seed", "AUC gain", "click rate", "revenue"],
                rows=[[p["model"], p["seed"], f"{p['auc_gain']:+.4f}", f"{p['ctr_lift']:+.2%}",
                       f"{p['rpm_lift']:+.2%}"] for p in related["points"]]),
    ]  # fmt: skip


def _lifts(found: dict[str, Any]) -> list[str]:
    """Both lifts with their intervals, in words."""
    said = []
    for name in ("ctr_lift", "rpm_lift"):
        value, ci = found[name], found[f"{name}_ci"]
        said.append("–" if value is None else f"{value:+.2%} [{ci[0]:+.2%}, {ci[1]:+.2%}]")
    return said


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.paper.abtest`."""
    config = tyro.cli(ABTestConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    run = Run(config.out)
    data_set = data_sets.make_shop(run, config.shop, {**shop.CTR, "ubm": config.ubm})
    runs = ModelRuns(run, data_set, config.seeds, config.jobs)
    models = [Model(name=BASE, mim=False), Model(name=MIM, mim=True)]
    models += [Model(name=name, mim=True, options=options) for name, options in VARIANTS.items()]
    runs.train(models)
    traffic = Traffic.of_shop(data_set.data.out)
    test = Test(config, traffic, runs)
    gains = np.array(runs.auc(MIM)) - np.array(runs.auc(BASE))
    report: dict[str, Any] = {
        "auc_gain": float(gains.mean()),
        "auc_gain_std": deviation(gains),
        **test.lifts(MIM),
        "drawn": lifts(test.drawn(BASE), test.drawn(MIM), config.draws, seed=0),
        "by_category": by_category(test, traffic, runs, config),
        "relation": relation(test, runs),
        "requests": len(np.unique(traffic.request_id)),
        "paper": {"release": PAPER_RELEASE, "total": PAPER_TOTAL},
        "stages": run.seconds,
        "config": dataclasses.asdict(config),
    }
    summary = (
        f"A simulation, no users: {data_set.title}; {report['requests']:,} test requests ranked by "
        f"{config.ubm.upper()} without and with MIM, {len(config.seeds)} seeds."
    )
    images = {"relation.png": draw(report["relation"]["points"])}
    write_pages(report, "A simulated online test", summary, sections(report, config), images, run.root)
    print((run.root / "report.md").read_text())


if __name__ == "__main__":
    program.run(main)
