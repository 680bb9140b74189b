"""Configuration of the CTR stage; every field is a flag of `mim ctr`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro

from mim_torchrec.ciubm.content import Pooling
from mim_torchrec.ciubm.ubm.interface import UBMOptions
from mim_torchrec.ciubm.ubm.registry import built_in_models, find_model
from mim_torchrec.data.features import Features
from mim_torchrec.domains import Count, Domain, Fraction, Natural, Positive, Share, Temperature, Weight
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.extras import needs
from mim_torchrec.training.config import CheckpointConfig, Timeouts
from mim_torchrec.training.precision import Precision
from mim_torchrec.training.presets import Preset, chosen, flags_of

Memory = Literal["device", "uvm", "uvm_caching"]
Sharding = Literal["table_wise", "row_wise", "column_wise"]
PRESETS: dict[Preset, dict[str, Any]] = {
    "default": {},
    "paper": {  # §3.4, §4.1.2, §4.1.3
        "mim": "on", "ubm": "sim", "id_interest": True, "content_interest": True, "fusion_interest": True,
        "content_pooling": "sum", "content_projection": "none", "content_temperature": None,
        "similarity_interest": False, "dot_product_features": False, "content_dropout": 0.0,
        "id_dropout": 0.0, "id_shrinkage": 0.0, "normalize_ids": True, "keep_shrinkage": False,
        "batch_size_per_rank": 1024, "lr": 5e-3, "weight_decay": 0.0, "clip_norm": None,
        "sparse_optimizer": "adam", "sparse_lr": 5e-3, "sparse_weight_decay": 0.0,
    },
    "recommended": {
        "content_pooling": "mean", "dot_product_features": True, "similarity_interest": True,
        "id_shrinkage": 60.0, "keep_shrinkage": True, "lr": 1e-3,
    },
}  # fmt: skip
"""Fields of `CTRConfig` by preset; other fields have their defaults."""
SETTLES = {"batch_size": ("batch_size_per_rank",)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the CTR model is made of."""

    mim: Literal["on", "off"] = "on"
    """`off` trains Base: ids only, no table."""
    ubm: Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(built_in_models())}}}|MODULE:CLASS")] = "din"
    """User behavior model of the ID interest (Eq. 1), or package.module:ClassName of your own `UBMOptions`.
    Its options are flags as well; `--ubm NAME --help` shows them."""
    ubm_options: Annotated[UBMOptions, tyro.conf.arg(name="")] = field(default_factory=UBMOptions)
    """Options of the user behavior model."""
    id_interest: bool = True
    """Feed the ID interest to the tower (Table 5)."""
    content_interest: bool = True
    """Feed the content interest to the tower (Eq. 7, Table 5)."""
    fusion_interest: bool = True
    """Feed the fusion interest to the tower (Eq. 8, Table 5)."""
    content_pooling: Pooling = "sum"
    """Content and fusion interest: the paper's sum over behaviors, or their mean."""
    content_projection: Literal["none", "layer_norm", "linear"] = "none"
    """What the content interest passes before the tower; `linear` is a layer norm and a linear layer."""
    content_dim: Count = 32
    """Size of the content interest after a linear projection."""
    similarity_interest: bool = False
    """Feed the tower how the relevance of the behaviors is distributed: counts by tier, maximum,
    recency-weighted mean; beyond the paper."""
    similarity_tiers: Count = 20
    """Equal parts of [-1, 1] in which the similarity interest counts behaviors."""
    similarity_spans: tuple[Natural, ...] = (5, 0)
    """Spans that the similarity interest describes, each a number of most recent behaviors; 0 is all of
    them."""
    content_temperature: Temperature | None = None
    """Weigh behaviors by softmax(relevance / temperature), with a learnable temperature that starts here;
    beyond the paper, which weighs them by the relevance."""
    content_dropout: Fraction = 0.0
    """Fraction of the candidates that are trained as if they had no vector; beyond the paper."""
    id_dropout: Fraction = 0.0
    """Fraction of the candidates that are trained with a hidden item id, as if they were new; beyond the
    paper."""
    id_shrinkage: Weight = 0.0
    """Empirical-Bayes shrinkage of rare ids: embeddings are multiplied by c / (c + k), where k is this number
    and c counts the training impressions of the id; 0 leaves them as they are; beyond the paper."""
    id_shrinkage_of: dict[str, Weight] = field(default_factory=dict)
    """k of some tables, as TABLE NUMBER such as `user_id 1000`; `id_shrinkage` is that of the others."""
    keep_shrinkage: bool = False
    """Multiply what the batch normalization at the entry of the tower makes of ID embeddings by how small
    `id_shrinkage` has made their tables, which the normalization undoes; beyond the paper. A preset sets it
    only where there is such a shrinkage and such a normalization."""
    dot_product_features: bool = False
    """Feed the tower the inner product of each interest with the target as well."""
    embedding_dim: Annotated[int, Domain(least=4, multiple=4)] = 16
    """Size of the embeddings of users, queries, items, categories and sparse features."""
    sparse_features: tuple[str, ...] = ()
    """Further columns of ids. A column whose name begins with `candidate_` is parallel to the candidates. One
    that begins with `behavior_` is parallel to the behaviors and added to their ID embeddings. Any other has
    one id per request, or a list of ids, whose embeddings are averaged."""
    dense_features: tuple[str, ...] = ()
    """Further columns of numbers, likewise; the model gets sign(x) log(1 + |x|)."""
    bucket_features: dict[str, str] = field(default_factory=dict)
    """Further columns of numbers, each as COLUMN BOUNDARIES such as `price 0,10,100`: every range between two
    boundaries has an embedding."""
    other_features: dict[str, str] = field(default_factory=dict)
    """Further columns of a kind of your own, as COLUMN package.module:ClassName; see
    mim_torchrec.data.features."""
    second_label: str | None = None
    """Name of a label after the click, such as `purchase`, whose column is `labels_<name>`: a second tower
    predicts it by ESMM (pCTCVR = pCTR pCVR)."""
    second_weight: Weight = 1.0
    """Weight of the loss of the second label."""
    recency: Literal["time", "order"] = "time"
    """How BST, SIM and TWIN measure how far a behavior lies back: by its time, or by the number of later
    behaviors, for data without times."""
    aux_weight: Weight = 1.0
    """Weight of the auxiliary loss of DIEN and of SIM's soft search; 0 leaves it out."""
    tower: tuple[Count, ...] = (200, 80)
    """Hidden layers of the deepCTR tower."""
    batch_norm: bool = True
    """Batch normalization in the tower, over the batch of all ranks."""
    normalize_ids: bool = True
    """Whether the batch normalization at the entry of the tower includes what comes of ID embeddings, which
    scales up rows that `id_shrinkage` has made small; `False` is beyond the paper and needs `batch_norm`."""
    dropout: Fraction = 0.0
    """Dropout in the tower and in BST."""

    def __post_init__(self) -> None:
        expected = find_model(self.ubm)
        if type(self.ubm_options) is UBMOptions:  # not given
            object.__setattr__(self, "ubm_options", expected())
        elif type(self.ubm_options) is not expected:
            raise ValueError(f"the options of {self.ubm} are {expected.__name__}, not {self.ubm_options!r}")

    @property
    def shrinks_ids(self) -> bool:
        """Whether embeddings of any table of ids are shrunk."""
        return self.id_shrinkage > 0 or any(k > 0 for k in self.id_shrinkage_of.values())

    @property
    def undoes_shrinkage(self) -> bool:
        """Whether the normalization at the entry of the tower undoes what shrinkage does."""
        return self.shrinks_ids and self.batch_norm and self.normalize_ids

    def shrinkage(self, table: str) -> float:
        """k of a table of ids."""
        return self.id_shrinkage_of.get(table, self.id_shrinkage)

    def features(self) -> Features:
        """Columns beyond those that all requests have."""
        return Features(
            sparse=self.sparse_features, dense=self.dense_features, buckets=self.bucket_features,
            other=self.other_features, second_label=self.second_label,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CTRConfig(ModelConfig):
    """Train a CTR model on request logs and evaluate it on the test requests.

    One process, or several under torchrun. Writes config.json, history.jsonl, metrics.json and
    predictions.parquet into `out`.
    """

    data: Place
    """Dataset directory."""
    out: Place
    """Directory of the results; made if missing."""
    train_days: str | None = None
    """Days whose requests are trained on, as 2026-11-01..2026-11-20 (both included) or one day, of requests
    in folders of days (`dt=2026-11-01`). By default all of requests/train. Where requests/ has no folders of
    splits, each split is a range of days."""
    validation_days: str | None = None
    """Likewise, of the validation requests."""
    test_days: str | None = None
    """Likewise, of the test requests."""
    table: Place | None = None
    """Directory of the multi-modal table; needed when `mim` is on, not read when it is off."""
    table_version: Annotated[str | None, tyro.conf.arg(aliases=["--expected-table-version"])] = None
    """Version that the table must have; another is refused."""
    windows: str | None = None
    """Window log of the table, a directory or a Redis URL. New items that `mim rim` publishes enter the table
    during training. By default the table does not change."""
    windows_every: Count = 100
    """Steps between two reads of the window log."""
    preset: Preset = "default"
    """Defaults of all other flags. `paper` is the paper to the letter; its Adam for embedding tables needs a
    GPU. `recommended` has raised the AUC on every data set that was measured."""
    warm_start: Place | None = None
    """Directory of an earlier run of `mim ctr`, from whose best weights training starts, for example on the
    data of a new day. Known ids keep their embeddings; new ids and the optimizers start from scratch."""
    seed: Natural = 0
    """Seed of the initial weights, of the order of the requests and of dropout."""
    epochs: Count = 4
    """Passes over the training requests; the best by validation AUC is kept. A finished run that is started
    again with more epochs trains the additional ones."""
    patience: Count | None = None
    """Stop after this many epochs without a better validation AUC."""
    batch_size: Count = 1024
    """Candidates in a step, over all ranks; 1,024 on eight GPUs are 128 on each."""
    batch_size_per_rank: Count | None = None
    """Candidates in a step of each rank, in the place of `batch_size`: more ranks then take larger steps."""
    lr: Weight = 5e-3
    """Learning rate of the dense part (AdamW); the paper's is 0.005."""
    weight_decay: Weight = 0.0
    """Weight decay of the dense part."""
    precision: Precision = "fp32"
    """Matrix products of the dense part: `tf32` for all of them, on GPUs; `bf16` for linear layers. Weights,
    embeddings, sums over histories, normalization and losses stay float32."""
    clip_norm: Positive | None = None
    """Longest gradient of the dense part that a step is taken with; a longer one is shortened to it."""
    sparse_lr: Weight = 0.02
    """Learning rate of the embedding tables."""
    warmup_steps: Natural = 0
    """Steps over which both learning rates rise linearly to their values."""
    sparse_optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    """Optimizer of the embedding tables, fused into the backward pass; Adam on GPUs only."""
    sharding: tuple[Sharding, ...] = ("table_wise", "row_wise")
    """Sharding types that the planner may choose from, by their estimated cost. On a CPU pooled tables are
    not divided by rows, and one rank holds a whole table. `column_wise` is not possible with row-wise
    Adagrad, whose one number per row would become one per part."""
    sparse_memory: Memory = "device"
    """Where the embedding tables are: memory of the device, managed (UVM) memory of the host, or that behind
    a cache on the device; the last two on GPUs only."""
    table_memory: Memory = "device"
    """Where the multi-modal table is, likewise."""
    load_factor: Annotated[float, Domain(above=0, most=1)] = 0.2
    """Rows of the cache on the device per row, for tables in uvm_caching."""
    pipeline: Literal["auto", "on", "off"] = "auto"
    """Exchange the ids of the next batch between ranks while the current one is computed (TorchRec's train
    pipeline); `auto`: on several GPUs. The results are the same."""
    exchange_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How embeddings and their gradients travel between ranks: `bf16` and `fp16` take half the bytes, and
    round. Gradients, which are small, travel as bf16 in either case. Multi-modal vectors travel as they are
    stored. One rank exchanges nothing."""
    index_dedup: Literal["auto", "on", "off"] = "auto"
    """Look up every distinct item and category of a batch once; `auto`: on several GPUs, as only GPUs have
    the kernel. Multi-modal vectors are always looked up this way."""
    sparse_weight_decay: Weight = 0.0
    """L2 regularization of the embedding rows that a step touches (row-wise Adagrad and SGD)."""
    embedding_init_std: Positive | None = None
    """Standard deviation of the initial embeddings; by default uniform within 1 / sqrt(rows)."""
    max_behaviors: Count = 50
    """Most recent behaviors of a request that are used."""
    buffer_rows: Count | None = None
    """Training requests that are shuffled together and lie in memory, of each rank; by default those of eight
    row groups, but at most 262,144. A second buffer is filled meanwhile, unless --prefetch is 0."""
    prefetch: Natural = 4
    """Batches that a thread reads ahead and maps to embedding rows, of each rank; 0 reads when a batch is
    needed."""
    spare_rows: Weight = 0.0
    """Spare rows of the ID tables, as a fraction of the ids seen in training."""
    min_count: Count = 1
    """Occurrences in the training requests that an id needs for a row of its own; rarer ids share row 0, the
    one of unknown ids."""
    max_ids: dict[str, Count] = field(default_factory=dict)
    """Ids that get rows of their own in some tables, as TABLE NUMBER such as `item_id 1000000`: the most
    frequent ones; others share row 0. With `warm_start` it bounds tables that would grow every day."""
    count_decay: Share = 0.5
    """What an occurrence in the run of `warm_start` counts beside one in this run, where the most frequent
    ids are chosen; it decays again with every run."""
    max_unknown: Share = 0.5
    """Fraction of unknown ids of one kind above which a warning is logged."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Stop at a malformed request, or skip and count it."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    timeout: Timeouts = field(default_factory=Timeouts)
    id_cache: LocalPath | None = None
    """Folder of the ids found in training requests, which runs on the same files share; by default one inside
    `out`."""
    log_every: Count = 20
    """Steps between two lines of the log."""

    def days(self) -> dict[str, str | None]:
        """Ranges of days by split, as `Dataset` takes them."""
        return {"train": self.train_days, "validation": self.validation_days, "test": self.test_days}

    def resume_fingerprint(self) -> dict[str, Any]:
        """The fields that must be equal for a run to resume; it may get more epochs."""
        free = {"out", "preset", "pipeline", "index_dedup", "checkpoint", "timeout", "log_every",
                "prefetch", "id_cache", "epochs", "sparse_memory", "table_memory", "load_factor"}  # fmt: skip
        free.add("windows")  # their log may move
        return {name: value for name, value in asdict(self).items() if name not in free}

    def model(self) -> ModelConfig:
        """The part that describes the model."""
        return ModelConfig(**{f.name: self.__dict__[f.name] for f in fields(ModelConfig)})


def from_values(values: Mapping[str, Any]) -> CTRConfig:
    """The configuration that `asdict` has made a dictionary of.

    Raises:
        ValueError: it is not one of this version.
    """
    missing = {"ubm", "ubm_options"} - values.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    with needs("train"):
        from pydantic import TypeAdapter
    options = TypeAdapter(find_model(values["ubm"])).validate_python(values["ubm_options"])
    return TypeAdapter(CTRConfig).validate_python({**values, "ubm_options": options})


def parse(argv: Sequence[str] | None, **words: Any) -> CTRConfig:
    """A configuration from flags, whose defaults are those of the preset and the model that the flags name.

    Args:
        argv: the flags; None takes those of the process.
        words: what `tyro.cli` takes as well.
    """
    preset, values = chosen(argv, "mim ctr", PRESETS, SETTLES)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="mim ctr [OPTIONS]")
    parser.add_argument("--ubm", default=values.get("ubm", "din"))
    values["ubm"] = parser.parse_known_args(argv)[0].ubm
    try:
        default = CTRConfig(data=tyro.MISSING, out=tyro.MISSING, preset=preset, **values)
    except ValueError as error:
        parser.error(str(error))
    own = {option.name for option in fields(default.ubm_options)}
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.partition("=")[0]
        option = flag.removeprefix("--").replace("-", "_")
        models = [
            name for name, model in built_in_models().items() if option in {o.name for o in fields(model)}
        ]
        if flag.startswith("--") and models and option not in own:
            parser.error(f"{flag} is an option of --ubm {', '.join(models)}, not of {default.ubm}")
    words["description"] = f"{words.get('description') or ''}\n{_options_by_model()}"
    config = tyro.cli(CTRConfig, args=argv, default=default, **words)
    given = flags_of(sys.argv[1:] if argv is None else argv)
    if config.keep_shrinkage and "keep_shrinkage" not in given and not config.undoes_shrinkage:
        # the preset's, to which a flag has left nothing to keep
        return replace(config, keep_shrinkage=False)
    return config


def _options_by_model() -> str:
    """The flags that each user behavior model has, for `--help`, which describes those of one model only."""
    lines = ["Options of the user behavior models, which `--ubm NAME --help` describes:"]
    for name, model in built_in_models().items():
        flags = ", ".join(f"--{option.name.replace('_', '-')}" for option in fields(model))
        lines.append(f"    {name}: {flags or 'none'}")
    return "\n".join(lines)
