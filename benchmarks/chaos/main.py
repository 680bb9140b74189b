"""Whoever is killed when, no row is wrong, lost or doubled (§3.5): `make chaos`.

RIM, a follower into Redis, an embedded store and the ranks of a training job run as they do in production and
are killed at random moments, over a log in a directory and over one in Redis; windows come twice, out of
order and of another encoder, bases are folded and windows forgotten under readers, the server goes away. Then
every row of every reader is compared. At last the store, releases, workers and clients of a scoring server
fail under load (`server_faults.py`). The exit status is 1 if anything is not right.
"""

import dataclasses
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mim_torchrec import program
from mim_torchrec.benchmarks.chaos.inputs import TOLERANCE, Inputs, make_inputs
from mim_torchrec.benchmarks.chaos.run import Chaos, Outcome
from mim_torchrec.benchmarks.chaos.server_faults import ServerOutcome, run_server
from mim_torchrec.benchmarks.chaos.verify import Findings
from mim_torchrec.benchmarks.chaos.workers import Place, warm_up
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.benchmarks.measures.turns import threads_of_torch
from mim_torchrec.errors import check_sizes

Transport = Literal["directory", "redis"]
SHARES = {"rim": 0.4, "store": 0.2, "embedded": 0.2, "rank": 0.2}
"""Of the kills."""
NAMES = {"rim": "RIM", "store": "follower into Redis", "embedded": "embedded store", "rank": "training rank"}


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """Kill the processes of the representation center, and see whether all rows are right."""

    out: Path = Path("runs/chaos")
    """Directory of the report; what an earlier run has left there is removed."""
    kills: int = 240
    """SIGKILLs, over all transports."""
    transports: tuple[Transport, ...] = ("directory", "redis")
    """Where windows go."""
    items: int = 9000
    """Items of the shop; all but a tenth are fed."""
    requests: int = 1500
    """Requests of the shop, which the ranks train on."""
    epochs: int = 2
    """Of a training job."""
    pause: float = 0.6
    """Seconds between two faults that are no kills, at most."""
    injected: int = 1000
    """Faults of a server under load."""
    slack: float = 2.0
    """Seconds after its deadline in which an answer of the server is not late: they are the machine's. So is
    the time in which the clients were not let run."""
    limit: float = 1800.0
    """Seconds of one transport, after which it is an error that some still work."""
    seed: int = 0
    """Of items, kills and faults."""


def quotas(kills: int) -> dict[str, int]:
    """Kills by kind of process.

    >>> quotas(101)
    {'rim': 41, 'store': 20, 'embedded': 20, 'rank': 20}
    """
    parts = {kind: int(kills * share) for kind, share in SHARES.items()}
    return parts | {"rim": kills - sum(parts.values()) + parts["rim"]}


def run(config: ChaosConfig, inputs: Inputs, transport: Transport, kills: int) -> Outcome:
    """Chaos over one transport."""
    root = (config.out / transport).absolute()
    server = RedisServer(root / "redis")
    try:
        source, log = (str(root / "new"), str(root / "log")) if transport == "directory" else (
            f"{server.url}#items", f"{server.url}#log")  # fmt: skip
        place = Place(root=root, source=source, log=log, store=f"{server.url}#store", shop=inputs.shop,
                      encoder=inputs.encoder, base=inputs.base, version=inputs.version)  # fmt: skip
        chaos = Chaos(inputs, place, server, quotas(kills), config.pause, config.epochs,
                      config.limit, f"{config.seed} {transport}")  # fmt: skip
        return chaos.run()
    finally:
        server.kill()


def measure(config: ChaosConfig) -> dict[str, Any]:
    """All figures of the report."""
    inputs = make_inputs(config.out.absolute(), config.items, config.requests, config.seed)
    print(f"{len(inputs.arrivals)} arrivals; vectors of two items differ by at least {inputs.distance:.1e}, "
          f"those of one item by {TOLERANCE:.0e} at most", flush=True)  # fmt: skip
    warm_up()
    outcomes: dict[str, Outcome] = {}
    total, kills = Findings(), Counter[str]()
    for number, transport in enumerate(config.transports):
        count = len(config.transports)
        share = config.kills * (number + 1) // count - config.kills * number // count
        outcome = outcomes[transport] = run(config, inputs, transport, share)
        for found in (outcome.log, *outcome.readers.values()):
            total.add(found)
        kills += outcome.kills
        print(describe(transport, outcome), flush=True)
    problems = [f"{name}: {problem}" for name, outcome in outcomes.items() for problem in outcome.problems]
    of_server = run_server(config.out.absolute() / "server", config.injected, config.seed, config.slack)
    problems += [f"server: {problem}" for problem in of_server.problems]
    print(describe_server(of_server), flush=True)
    report: dict[str, Any] = {
        "kills": kills.total(),
        "kills_at_work": sum(outcome.at_work.total() for outcome in outcomes.values()),
        "rows": total.rows,
        "wrong": total.wrong,
        "lost": total.lost,
        "doubled": total.doubled,
        "problems": problems,
        "examples": total.examples,
        "closest_items": inputs.distance,
        "tolerance": TOLERANCE,
        "transports": {name: as_json(outcome) for name, outcome in outcomes.items()},
        **of_server.as_json(),
    }
    report["targets"] = [
        target(f"SIGKILLs: at least {config.kills}", report["kills"], report["kills"] >= config.kills),
        *(target(f"rows {what}: none", report[what], report[what] == 0 and report["rows"] > 0)
          for what in ("wrong", "lost", "doubled")),
        target("watermarks and answers that are not right: none", len(problems), not problems),
        target(f"faults of a server under load: at least {config.injected}", report["injected"],
               report["injected"] >= config.injected),
        *(target(f"server, {name.replace('_', ' ')}: none", report[name], report[name] == 0)
          for name in ("late_answers", "wrong_scores", "unexplained_500", "unrecovered")),
    ]  # fmt: skip
    return report


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON holds it."""
    return {
        **vars(outcome),
        "log": vars(outcome.log),
        "readers": {name: vars(found) for name, found in outcome.readers.items()},
    }


def describe(transport: str, outcome: Outcome) -> str:
    """Lines on one transport."""
    kills = ", ".join(f"{name} {outcome.kills[kind]} ({outcome.at_work[kind]} at work)"
                      for kind, name in NAMES.items())  # fmt: skip
    faults = ", ".join(f"{what} {count}" for what, count in sorted(outcome.faults.items()))
    refusals = ", ".join(f"{what} {count}" for what, count in sorted(outcome.refusals.items()))
    found = {"log": outcome.log, **outcome.readers}
    rows = ", ".join(f"{name} {f.rows} ({f.wrong} wrong, {f.lost} lost, {f.doubled} doubled)"
                     for name, f in found.items())  # fmt: skip
    marks = ", ".join(f"{name} {seq}" for name, seq in outcome.watermarks.items())
    return (f"{transport}, {outcome.seconds:.0f} s, {outcome.windows} windows, {outcome.jobs} training jobs\n"
            f"  kills: {kills}\n  faults: {faults}\n  refused: {refusals}\n  rows: {rows}\n"
            f"  watermarks: {marks}")  # fmt: skip


def describe_server(outcome: ServerOutcome) -> str:
    """Lines on the server."""
    faults = ", ".join(f"{what} {count}" for what, count in sorted(outcome.injected.items()))
    answers = ", ".join(
        f"{status or 'broken'} {count}" for status, count in sorted(outcome.tally.answers.items())
    )
    tally = outcome.tally
    wrong = f"{tally.wrong} wrong, {tally.late} late, {tally.unexplained} unexplained"
    left_out = "".join(f"\n  left out: {what}: {why}" for what, why in outcome.left_out.items())
    return f"server, {outcome.seconds:.0f} s\n  faults: {faults}{left_out}\n  answers: {answers}; {wrong}"


def sections(report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    outcomes = report["transports"]
    columns = ["", *outcomes]

    def rows(part: str, names: dict[str, str] | None = None) -> list[list[str]]:
        keys = names or {key: key for o in outcomes.values() for key in sorted(o[part])}
        return [[text, *(str(o[part].get(key, 0)) for o in outcomes.values())] for key, text in keys.items()]

    kills = [[text, *(f"{o['kills'].get(kind, 0)} ({o['at_work'].get(kind, 0)} at work)"
                      for o in outcomes.values())] for kind, text in NAMES.items()]  # fmt: skip
    compared = [
        [f"{transport}: {name}", *(str(found[key]) for key in ("rows", "wrong", "lost", "doubled"))]
        for transport, o in outcomes.items()
        for name, found in {"log": o["log"], **o["readers"]}.items()
    ]
    return [
        Section("Kills", columns=columns, rows=kills,
                text=["At work: it had published or applied a window, or taken a step, since its start."]),
        Section("Faults besides", columns=columns, rows=rows("faults")),
        Section("Processes that ended with the right error, and went on", columns=columns,
                rows=rows("refusals")),
        Section("Rows", columns=["", "rows", "wrong", "lost", "doubled"], rows=compared,
                text=["The log is compared with vectors that were computed one item at a time, within "
                      f"{report['tolerance']:.0e}; readers with the log, bit for bit."]),
        Section("Watermarks", columns=columns, rows=rows("watermarks"),
                text=["Of training, that of the last job; every job's rows are compared at its own."]),
        Section("Faults of a server under load", columns=["", "times"],
                rows=[[what, str(count)] for what, count in sorted(report["server"]["injected"].items())],
                text=[f"Left out: {what}: {why}." for what, why in report["server"]["left_out"].items()]),
        Section("Its answers by status; 0 is a connection that broke", columns=["", "times"],
                rows=[[status, str(count)] for status, count in report["server"]["answers"].items()]),
        targets_section(report["targets"]),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.chaos.main`.

    Raises:
        SystemExit: anything is not right; the exit status is 1.
    """
    config = tyro.cli(ChaosConfig, args=argv, description=__doc__)
    check_sizes(config, 1, "items", "requests", "epochs")
    check_sizes(config, 0, "kills", "pause", "limit", "slack")
    if config.out.exists():
        shutil.rmtree(config.out)
    config.out.mkdir(parents=True)
    with threads_of_torch(1):
        report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = f"{report['kills']} SIGKILLs, {report['kills_at_work']} of them at work, seed {config.seed}."
    write_pages(report, "Chaos", summary, sections(report), {}, config.out)
    for problem in [*report["problems"], *report["examples"]]:
        print(problem)
    for example in report["server"]["examples"]:
        print(example)
    if not all(entry["met"] for entry in report["targets"]):
        raise SystemExit(1)


if __name__ == "__main__":
    program.run(main)
