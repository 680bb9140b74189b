"""Films and posters of MovieLens: the stages that import them and train their encoder, and the settings."""

from pathlib import Path

from mim_torchrec.benchmarks.harness.stages import Stage, Value

ENCODER: dict[str, Value] = {
    "vision.name": "efficientnet_lite0",
    "vision.image-size": 128,
    "text.name": "minilm",
    "freeze-towers": True,
}
CSFT: dict[str, Value] = {
    "epochs": 8,
    "batch-size": 512,
    "lr": 1e-3,
    "gamma": 1.0,
    "head.principal-dim": 128,
}
TRAINING: dict[str, Value] = {"epochs": 10, "patience": 2, "dropout": 0.2}
GRID: tuple[dict[str, Value], ...] = (
    {"weight-decay": 0.0, "sparse-lr": 0.02},
    {"weight-decay": 1e-2, "sparse-lr": 0.02},
    {"weight-decay": 1e-2, "sparse-lr": 0.05},
)


def import_stage(source: Path, root: Path, split: str) -> Stage:
    """Ratings and posters as a data set, divided by each user's time ("user") or by time ("global")."""
    out = root / f"movielens-{split}"
    posters = source / "posters.parquet"
    return Stage(
        name=f"import-{split}",
        command=("import", "movielens"),
        options={"ratings": source, "posters": posters, "out": out, "split": split},
        out=out,
        files=(source / "ratings.csv", source / "movies.csv", posters),
    )


def csft_stage(root: Path, data: Stage) -> Stage:
    """C-SFT on films that a user liked one after the other, above frozen pretrained towers."""
    out = root / f"csft-{data.out.name}"
    options: dict[str, Value] = {"data": data.out, "out": out, "seed": 0, **ENCODER, **CSFT}
    return Stage(name=out.name, command=("csft",), options=options, out=out, ranks="1x1", after=(data,))
