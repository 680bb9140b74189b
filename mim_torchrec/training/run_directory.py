"""The directory of a run: its names, who may write into it, and what belongs together in it.

    <out>/config.json            the configuration, written when a run is known to be a new one or the same
    <out>/vocabulary/            ids of the training data (CTR)
    <out>/best/                  the best weights, with `model.json`
    <out>/checkpoints/           see `checkpoints.py`
    <out>/history.jsonl          see `history.py`
    <out>/metrics.json, <out>/predictions.parquet
    <out>/lease.json             who writes, while somebody does

A run that may not be resumed is refused before a byte is changed. Not here: what a stage makes of its best
weights (`encoder/`, `towers/`).
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.embeddings.files import (
    atomic_directory,
    clear_leftovers,
    discard_directory,
    json_text,
    remove_directory,
    replace_files,
    sha256,
    write_json,
)
from mim_torchrec.embeddings.remote.fetching import working_directory
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.outputs import look_for
from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.embeddings.remote.published import Publisher
from mim_torchrec.embeddings.remote.restoring import restore
from mim_torchrec.errors import OptionError
from mim_torchrec.training.checkpoints import (
    CheckpointConfig,
    checkpoints_in,
    refuse_other_run,
    resume_fingerprint_in,
)
from mim_torchrec.training.distributed import DistributedContext, is_restarted
from mim_torchrec.training.lease import Lease, leased_by_rank_0
from mim_torchrec.training.shared_directory import partial_of

log = logging.getLogger(__name__)

CACHES = ("items", "ids", "features", "lease.json")
"""What is of this host only, and is not published."""


class RunDirectory:
    """The directory that a stage writes its results into.

    One at a URL is made in a local directory, which begins as what was published there. It is published as a
    whole with every checkpoint, and at the end; see `embeddings/remote/published.py`.

    Args:
        place: its path, or the URL of one.

    Attributes:
        root: the local directory.
    """

    def __init__(self, place: Path | Url) -> None:
        self.place = place
        self.root: Path = place if isinstance(place, Path) else working_directory(place)
        self._lease: Lease | StoreLease | None = None
        self._publisher: Publisher | None = None
        self._as_of = ""

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.root / "config.json"

    @property
    def vocabulary(self) -> Path:
        """The vocabularies of a CTR model."""
        return self.root / "vocabulary"

    @property
    def best(self) -> Path:
        """The best weights."""
        return self.root / "best"

    @property
    def checkpoints(self) -> Path:
        """What the run is resumed from."""
        return self.root / "checkpoints"

    @property
    def history(self) -> Path:
        """Steps and epochs."""
        return self.root / "history.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def metrics(self) -> Path:
        """What the stage reports."""
        return self.root / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Scores of the test requests."""
        return self.root / "predictions.parquet"

    def part(self, name: str) -> "RunDirectory":
        """The directory of a phase, under the lease of the whole."""
        part = RunDirectory(self.root / name)
        part._lease, part._publisher = self._lease, self._publisher
        part._as_of = f"{self._as_of}{name}/"
        return part

    @contextmanager
    def writing(self, context: DistributedContext) -> Iterator[None]:
        """Be the only writer for a block; every rank enters it, rank 0 holds the lease.

        Raises:
            LeaseError: another process writes; the message names it.
        """
        at_url = isinstance(self.place, Url)
        leased = self.place if isinstance(self.place, Url) else self.root / "lease.json"
        with leased_by_rank_0(leased, context) as self._lease:
            on_all_ranks(lambda: self._begin_at_url() if context.is_main and at_url else None)
            on_all_ranks(lambda: look_for(self.root) if at_url else None)
            on_all_ranks(lambda: clear_leftovers(self.root) if context.is_main else None)
            try:
                yield
                if at_url:
                    self.check_lease()
                    on_all_ranks(self._publish_all)
            finally:
                self._lease = self._publisher = None

    def _begin_at_url(self) -> None:
        """Make the local directory what was published; only caches of an earlier run on this host stay."""
        assert isinstance(self.place, Url)
        self._publisher = Publisher(self.place)
        restore(self._publisher.index, self.root, keep=CACHES)

    def upload(self, *names: str) -> None:
        """Upload files and folders that the next `publish` makes visible; only rank 0 at a URL does anything.

        Raises:
            StoreError: a file could not be written; what was published stays.
        """
        if self._publisher is not None:
            self._publisher.upload(self.root, names, self._as_of)

    def publish_checkpoint(self) -> None:
        """Publish a checkpoint that was finished, with all that a run is resumed from; as `upload`."""
        if self._publisher is None:
            return
        with TemporaryDirectory(dir=self.root) as name:  # a copy of what grows
            folder = Path(name)
            for file in (self.config, self.history):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
            self._publisher.upload(folder, [self.config.name, self.history.name], self._as_of)
        self.upload(self.vocabulary.name, self.checkpoints.name)
        self._publisher.publish()

    def _publish_all(self) -> None:
        if self._publisher is not None:
            self._publisher.upload_all(self.root, leave_out=CACHES)
            if self._lease is not None:
                self._lease.check()  # again: an upload may take long
            self._publisher.publish()
            log.info("published at %s", self.place)

    def check_lease(self) -> None:
        """See that no other process has taken the directory over; all ranks raise if one has.

        Raises:
            LeaseError: one has.
        """
        on_all_ranks(self._lease.check if self._lease is not None else lambda: None)

    def resumes(self, config: CheckpointConfig) -> bool:
        """Whether a run with this configuration goes on from a checkpoint."""
        return (config.resume == "auto" or is_restarted()) and bool(checkpoints_in(self.checkpoints))

    def refuse_trained(self) -> None:
        """See that no stage has trained here: what only evaluates would replace the metrics of its run.

        Raises:
            OptionError: one has.
        """
        if self.config.is_file():
            raise OptionError(
                f"--out {self.place} is the directory of a training run, whose results would be replaced; "
                "choose another"
            )

    def refuse_other(
        self, config: CheckpointConfig, fingerprint: dict[str, Any], *, whole: bool = True
    ) -> None:
        """Compare a run that starts with the one whose checkpoints are here; nothing is written.

        Args:
            config: whether it resumes.
            fingerprint: of the run that starts.
            whole: whether it is all of the fingerprint; else only what it has is compared.

        Raises:
            ResumeError: it is another one, and would go on from the checkpoints.
        """

        def compare() -> None:
            found = resume_fingerprint_in(self.checkpoints) if self.resumes(config) else None
            if found is not None:
                refuse_other_run(*found, fingerprint, None if whole else fingerprint)

        on_all_ranks(compare)

    def begin(
        self, config: dict[str, Any], checkpoint: CheckpointConfig, context: DistributedContext
    ) -> None:
        """Write config.json after `refuse_other`; a run from scratch removes earlier results.

        Args:
            config: of the run.
            checkpoint: whether it resumes.
            context: the process group; every rank calls it.

        Raises:
            LeaseError: another process has taken the directory over.
        """

        def write() -> None:
            if not context.is_main:
                return
            if not self.resumes(checkpoint):
                for file in (self.metrics, self.predictions, self.history):
                    file.unlink(missing_ok=True)
                if self.best.exists():
                    remove_directory(self.best)
                if self.checkpoints.exists():
                    remove_directory(self.checkpoints)
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.config, config)

        self.check_lease()
        on_all_ranks(write)

    def read_config(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            DataError: there is none, or it is no JSON.
        """
        try:
            return json.loads(self.config.read_text())
        except FileNotFoundError:
            raise DataError(f"is no run: it has no {self.config.name}", file=self.root) from None
        except ValueError as error:
            raise DataError(f"cannot be read: {error}", file=self.config) from None

    def promote_best(self, name: str, context: DistributedContext) -> Path:
        """Give the best weights of a finished run the name that later stages use, and end `best`.

        A run that is finished already has no `best`, and its result stays.

        Returns:
            Where they are.
        """
        target = self.root / name

        def promote() -> None:
            if context.is_main and self.best.exists():
                with atomic_directory(target) as folder:
                    shutil.copytree(self.best, folder, dirs_exist_ok=True)
                remove_directory(self.best)

        self.check_lease()
        on_all_ranks(promote)
        return target

    def write_results(
        self,
        metrics: dict[str, Any],
        context: DistributedContext,
        predictions: Path | None = None,
    ) -> None:
        """Write metrics.json and, where there are any, predictions.parquet; every rank calls it.

        Args:
            metrics: what the stage reports.
            context: the process group.
            predictions: a file on the same file system that takes the name, on rank 0.
        """

        def write() -> None:
            if not context.is_main:
                return
            self.root.mkdir(parents=True, exist_ok=True)
            contents: dict[Path, bytes | Path] = {}
            facts = dict(metrics)
            if predictions is not None:
                contents[self.predictions] = predictions
                facts["predictions_sha256"] = sha256(predictions)
            replace_files(contents | {self.metrics: json_text(facts).encode()})
            discard_directory(partial_of(self.predictions))

        self.check_lease()
        on_all_ranks(write)

    def read_results(self) -> tuple[dict[str, Any], Path]:
        """What metrics.json holds, and the file of the predictions that it is about.

        Raises:
            DataError: there are no results, or the predictions are of other ones.
        """
        try:
            metrics = json.loads(self.metrics.read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise DataError(f"cannot be read: {error}; run the stage again", file=self.metrics) from None
        # a kill between the two renames leaves the predictions before under a name that ends in .old
        for file in (self.predictions, *self.root.glob(f"{self.predictions.name}.*.old")):
            if file.is_file() and sha256(file) == metrics.get("predictions_sha256"):
                return metrics, file
        raise DataError(f"is not of {self.metrics}; run the stage again", file=self.predictions)
