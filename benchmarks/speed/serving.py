"""What a score costs at serving: `make bench-serving`.

Content and fusion interest by a matrix of the history beside the direct sum, in turns and at one thread;
scores of every model and preset beside one bare product of the same vectors; scores beside the same model
computed as training does; and a real server over HTTP with requests of 500 candidates, one client and eight,
one worker and two, one user and eight. Weights are random: what is timed does not depend on them.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from mim_torchrec import program
from mim_torchrec.benchmarks.harness.comparison import target
from mim_torchrec.benchmarks.harness.pages import Section, targets_section, write_pages
from mim_torchrec.benchmarks.measures.turns import seconds_by_name, threads_of_torch
from mim_torchrec.benchmarks.speed.serving_inputs import (
    AT,
    InputConfig,
    columns,
    make_bundle,
    make_request,
    make_table,
)
from mim_torchrec.benchmarks.speed.serving_process import (
    Served,
    as_message,
    compare_processes,
    load,
    process_section,
    process_targets,
)
from mim_torchrec.benchmarks.speed.serving_scores import (
    UBMS,
    by_model,
    compare_models,
    score_section,
    score_targets,
)
from mim_torchrec.ciubm.content import content_relevance, relevant_interest
from mim_torchrec.errors import check_sizes
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.grid import Grid
from mim_torchrec.serving.matrix import interest_matrix, normalized
from mim_torchrec.serving.scorer import Scorer

RATIO_TARGETS = {64: 5.0, 128: 4.0}
P99_TARGET = 30.0
MODELS = ("sim/paper", "sim/recommended", "din/paper")


@dataclass(frozen=True, kw_only=True)
class ServingConfig(InputConfig):
    """Time the parts of a score, and a server; write a report."""

    models: tuple[str, ...] = MODELS
    """Models that are served; the first one's figures stand for the server."""
    ubms: tuple[str, ...] = UBMS
    """User behavior models whose scores are compared, with both presets."""
    rounds: int = 31
    """Timed rounds of every form."""
    score_rounds: int = 101
    """Timed rounds of the scores of all models and presets."""
    requests: int = 200
    """Requests of a client over HTTP, for each length of history; a tenth of them at the longest."""
    clients: int = 8
    """Clients at once."""
    threads: int = 2
    """Threads of a server."""


def compare_forms(config: ServingConfig, dim: int, length: int) -> dict[str, float]:
    """Content and fusion interest of a request, directly and by a matrix: milliseconds and ratios."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    candidates_mm, behaviors_mm = draw(config.candidates, dim), draw(length, dim)
    behaviors = draw(length, 2 * config.id_dim)
    pairs = Grid(config.candidates, length)
    kept = interest_matrix(behaviors_mm, behaviors)

    def direct() -> tuple[Tensor, Tensor]:
        relevance = content_relevance(candidates_mm, behaviors_mm, pairs)
        return (relevant_interest(behaviors_mm, relevance, pairs),
                relevant_interest(behaviors, relevance, pairs))  # fmt: skip

    def by(matrix: Tensor) -> Tensor:
        return normalized(candidates_mm) @ matrix

    with torch.inference_mode():
        found = by(kept)
        for one, other in zip(direct(), found.split([dim, 2 * config.id_dim], dim=1), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
        times = seconds_by_name(
            {"direct": direct, "matrix": lambda: by(interest_matrix(behaviors_mm, behaviors)),
             "cached": lambda: by(kept)},
            config.rounds, warmup=3,
        )  # fmt: skip
    ratios = [a / b for a, b in zip(times["direct"], times["matrix"], strict=True)]
    return {"ratio": statistics.median(ratios)} | {
        f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in times.items()
    }


def multiplications(config: ServingConfig, dim: int, length: int) -> float:
    """Multiplications of the direct sum over those of a matrix that is built for the request."""
    width = dim + 2 * config.id_dim
    direct = config.candidates * length * (dim + width)
    return direct / ((length + config.candidates) * dim * width)


def message(config: ServingConfig, length: int, seed: int) -> bytes:
    """The request as the protocol has it."""
    return as_message([columns(config, length, seed)])


def compare_scorers(config: ServingConfig, bundle: Path, table: Path, length: int) -> dict[str, float]:
    """Milliseconds of a score without HTTP: ours, ours with known matrices, and what training computes."""
    torch.set_num_threads(config.threads)
    opened = Bundle.open(bundle)
    request = make_request(config, length, 0)
    scorers = {
        "built": Scorer(opened, table),
        "cached": Scorer(opened, table, cache=10),
        "plain": Scorer(opened, table, plain=True),
    }
    forms = {name: lambda scorer=scorer: scorer.score([request]) for name, scorer in scorers.items()}
    times = seconds_by_name(forms, max(5, config.rounds // 3), warmup=3)
    torch.set_num_threads(1)
    return {f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in times.items()}


def serve(config: ServingConfig, bundle: Path, table: Path) -> dict[str, dict[str, float]]:
    """Figures of a server over HTTP by the length of the history; every request is of another history."""
    found = {}
    with Served(bundle, table, threads=config.threads) as server:
        for length in config.behaviors:
            count = config.requests if length < 10_000 else max(config.requests // 10, 1)
            bodies = [message(config, length, seed) for seed in range(count)]
            seconds, alone = load(server.address, bodies, 1)
            _, together = load(server.address, bodies, config.clients)
            p50, p99 = np.percentile(seconds, [50, 99])
            found[str(length)] = {"p50_ms": 1000 * float(p50), "p99_ms": 1000 * float(p99),
                                  "requests_per_s": alone, "requests_per_s_clients": together}  # fmt: skip
    return found


def measure(config: ServingConfig) -> dict[str, Any]:
    """All figures of the report."""
    torch.set_num_threads(1)
    forms = {
        str(dim): {str(length): compare_forms(config, dim, length) for length in config.behaviors}
        for dim in config.mm_dims
    }
    for dim, by_length in forms.items():
        for length, figures in by_length.items():
            print(f"d {dim:>3}, {length:>5} behaviors: direct {figures['direct_ms']:7.2f} ms, matrix "
                  f"{figures['matrix_ms']:6.2f}, cached {figures['cached_ms']:5.2f}, ratio "
                  f"{figures['ratio']:.1f}", flush=True)  # fmt: skip
    table = make_table(config)
    scores = compare_models(config, config.ubms, config.score_rounds, table)
    for name, figures in scores.items():
        print(f"{name}, {AT} behaviors: score {figures['score_ms']:.2f} ms, {figures['over_matmul']:.1f} "
              f"products, p99 over p50 {figures['p99_over_p50']:.2f}", flush=True)  # fmt: skip
    models: dict[str, Any] = {}
    for model in config.models:
        bundle = make_bundle(config, model)
        parts = {str(length): compare_scorers(config, bundle, table, length) for length in config.behaviors}
        http = serve(config, bundle, table)
        models[model] = {length: parts[length] | http[length] for length in parts}
        for length, figures in models[model].items():
            print(f"{model}, {length} behaviors: score {figures['built_ms']:.1f} ms (as in training "
                  f"{figures['plain_ms']:.1f}), HTTP p50 {figures['p50_ms']:.1f}, p99 "
                  f"{figures['p99_ms']:.1f}, {figures['requests_per_s_clients']:.0f} requests/s",
                  flush=True)  # fmt: skip
    first = models[config.models[0]]
    report: dict[str, Any] = {
        "direct_over_matrix": {length: f["ratio"] for length, f in forms[str(config.mm_dims[0])].items()},
        "forms": forms,
        "scores": scores,
        **by_model(scores),
        "models": models,
        "p50_ms": {length: figures["p50_ms"] for length, figures in first.items()},
        "p99_ms": {length: figures["p99_ms"] for length, figures in first.items()},
        "requests_per_s": {
            "1": {length: figures["requests_per_s"] for length, figures in first.items()},
            str(config.clients): {length: f["requests_per_s_clients"] for length, f in first.items()},
        },
    }
    report |= compare_processes(
        config.out / "bundles" / config.models[0].replace("/", "-"), table,
        lambda seed: columns(config, AT, seed),
        threads=config.threads, requests=config.requests, clients=config.clients,
    )  # fmt: skip
    report["targets"] = targets(config, report)
    return report


def targets(config: ServingConfig, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the figures are to show, as far as they were measured."""
    found = []
    for dim in config.mm_dims:
        by_length = report["forms"][str(dim)]
        if dim in RATIO_TARGETS and str(AT) in by_length:
            ratio, least = by_length[str(AT)]["ratio"], RATIO_TARGETS[dim]
            claim = f"d {dim}: the direct sum takes at least {least:.0f} times a matrix built, {AT} behaviors"
            found.append(target(claim, ratio, ratio >= least))
        cached = [figures["cached_ms"] for figures in by_length.values()]
        spread = max(cached) / min(cached)
        claim = f"d {dim}: with a known matrix the history's length costs nothing (at most 1.5 times)"
        found.append(target(claim, spread, spread <= 1.5))
    found += score_targets(report)
    if str(AT) in report["p99_ms"]:
        p99 = report["p99_ms"][str(AT)]
        claim = f"{config.models[0]}, {AT} behaviors, one client: p99 at most {P99_TARGET:.0f} ms"
        found.append(target(claim, p99, p99 <= P99_TARGET))
    return found + process_targets(report)


def sections(config: ServingConfig, report: dict[str, Any]) -> list[Section]:
    """The tables of the report."""
    pages = [
        Section(
            "Content and fusion interest of a request",
            text=["The direct sum is two products of matrices over all pairs; the matrix is made from the "
                  "history once a request, or known from an earlier one. One thread, in turns.",
                  f"At {AT} behaviors the direct sum has " + ", ".join(
                      f"{multiplications(config, dim, AT):.1f} (d {dim})" for dim in config.mm_dims
                  ) + " times the multiplications of a matrix built."],
            columns=["d", "behaviors", "direct, ms", "matrix, ms", "known matrix, ms", "direct / matrix"],
            rows=[[dim, length, f"{f['direct_ms']:.2f}", f"{f['matrix_ms']:.2f}", f"{f['cached_ms']:.2f}",
                   f"{f['ratio']:.1f}"]
                  for dim, by_length in report["forms"].items() for length, f in by_length.items()],
        ),
        score_section(report["scores"]),
        Section(
            "A score, without HTTP",
            text=["All of a request: rows from the mapped tables, ID interest, content and fusion interest, "
                  "tower. As in training: packed pairs, the direct sum, no grid."],
            columns=["model", "behaviors", "ours, ms", "known matrix, ms", "as in training, ms"],
            rows=[[model, length, f"{f['built_ms']:.1f}", f"{f['cached_ms']:.1f}", f"{f['plain_ms']:.1f}"]
                  for model, by_length in report["models"].items() for length, f in by_length.items()],
        ),
        Section(
            "A server over HTTP",
            text=[f"JSON by the Open Inference Protocol, {config.candidates} candidates, every request of "
                  f"another history; client and server share the machine; {config.threads} threads score."],
            columns=["model", "behaviors", "p50, ms", "p99, ms", "requests/s, 1 client",
                     f"{config.clients} clients"],
            rows=[[model, length, f"{f['p50_ms']:.1f}", f"{f['p99_ms']:.1f}", f"{f['requests_per_s']:.0f}",
                   f"{f['requests_per_s_clients']:.0f}"]
                  for model, by_length in report["models"].items() for length, f in by_length.items()],
        ),
        process_section(report),
        targets_section(report["targets"]),
    ]  # fmt: skip
    return pages


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m mim_torchrec.benchmarks.speed.serving`."""
    config = tyro.cli(ServingConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    check_sizes(
        config,
        1,
        "candidates",
        "id_dim",
        "items",
        "users",
        "rounds",
        "score_rounds",
        "requests",
        "clients",
        "threads",
    )
    config.out.mkdir(parents=True, exist_ok=True)
    with threads_of_torch(torch.get_num_threads()):
        report = measure(config)
    report["config"] = dataclasses.asdict(config)
    summary = f"Requests of {config.candidates} candidates; item embeddings of {2 * config.id_dim}."
    write_pages(report, "Serving", summary, sections(config, report), {}, config.out)


if __name__ == "__main__":
    program.run(main)
