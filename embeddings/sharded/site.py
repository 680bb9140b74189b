"""Where a collection is in a model, and how another one takes its place there.

In a ``DistributedModelParallel`` the plan and the fused optimizer follow. The optimizer stays the same
object, so a ``CombinedOptimizer`` or a train loop that holds it goes on with the new tables; the
data-parallel wrapper has never seen sharded tables and does not notice. Not here: models in a train pipeline,
which has sent the batches to come to the old collection already, two-dimensional parallelism, and delta
trackers.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.sharding_plan import ParameterShardingGenerator
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from mim_torchrec.embeddings.sharded.frozen import FrozenModule
from mim_torchrec.embeddings.sharded.sharded import ShardedFrozenModule
from mim_torchrec.embeddings.sharded.split import Parts, SplitCollection
from mim_torchrec.embeddings.sharded.trained import (
    SHARDED,
    check_fused,
    configs_of,
    is_trained,
    keys_of,
)
from mim_torchrec.embeddings.table.manifest import TableError

Plans = dict[str, dict[str, ParameterSharding]]  # by path below the collection ("" is itself) and table


@dataclass(frozen=True)
class Site:
    """A collection in a model.

    Args:
        root: the model without its wrappers.
        path: of the collection in it.
        table: one of its tables.
        module: the collection.
        dmp: the wrapper of the model, if it is sharded.
    """

    root: nn.Module
    path: str
    table: str
    module: nn.Module
    dmp: DistributedModelParallel | None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.table}"

    @property
    def env(self) -> ShardingEnv | None:
        """The ranks that the model is sharded over."""
        return None if self.dmp is None else self.dmp._env

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.dmp is None else self.dmp._env.process_group

    @property
    def device(self) -> torch.device:
        """Of what ranks send each other."""
        return torch.device("cpu") if self.dmp is None else self.dmp.device

    def plan(
        self, whole: nn.Module, sharder: ModuleSharder[nn.Module], sharding: ParameterShardingGenerator
    ) -> dict[str, ParameterSharding]:
        """Return how the table is sharded, of a collection without memory that has it."""
        assert self.env is not None
        parameter, size = sharder.shardable_parameters(whole)[self.table], self.env.world_size
        return {self.table: sharding(parameter, get_local_size(size), size, self.device.type, sharder)}

    def frozen_plans(self, parts: Parts) -> Plans:
        """Return the plans of the frozen tables of a collection."""
        if self.dmp is None:
            return {}
        modules: dict[str, Any] = dict(parts.frozen)
        return {f"frozen.{name}": dict(module.module_sharding_plan) for name, module in modules.items()}

    def parts(self) -> Parts:
        """Return the tables of the collection, trained and frozen.

        Raises:
            TableError: it is of another kind, or the table is one of several of a frozen collection.
        """
        module = self.module
        if isinstance(module, SplitCollection):
            return module.parts()
        if isinstance(module, FrozenModule):
            tables = module.frozen_tables()
            if len(tables) > 1:
                raise TableError(
                    f"{self.path}: one frozen collection of tables {sorted(tables)}; give {self.table} a "
                    f"collection of its own"
                )
            config = tables[self.table].config
            return Parts([config], list(config.feature_names), None, {self.table: module})
        return Parts(configs_of(module), keys_of(module), module, {})

    def put(self, module: nn.Module, plans: Plans) -> None:
        """Put another collection into this place of the model.

        Args:
            module: the collection, sharded if the model is.
            plans: of its parts.
        """
        parent, _, attribute = self.path.rpartition(".")
        setattr(self.root.get_submodule(parent), attribute, module)
        if self.dmp is None:
            return
        plan = self.dmp._plan.plan
        for path in [path for path in plan if path == self.path or path.startswith(f"{self.path}.")]:
            del plan[path]
        for below, by_table in plans.items():
            path = f"{self.path}.{below}" if below else self.path
            plan[path] = EmbeddingModuleShardingPlan(by_table)
        self.dmp._optim._optims[:] = cast(
            list[Any], self.dmp._fused_optim_impl(self.root, [], module_id_cache={})
        )


def find_site(model: nn.Module, name: str) -> Site:
    """Find a table of a model by its path, such as "sparse.ebc.item".

    Raises:
        TableError: there is none, or its collection cannot be replaced.
    """
    dmp = model if isinstance(model, DistributedModelParallel) else None
    root = dmp.module if dmp is not None else model
    path, _, table = name.rpartition(".")
    found = tables_of(root)
    if table not in found.get(path, ([], root))[0]:
        names = [f"{where}.{each}" for where, (tables, _) in found.items() for each in tables]
        raise TableError(f"the model has no table {name!r} that could be frozen or thawed, it has {names}")
    site = Site(root, path, table, found[path][1], dmp)
    _check(site)
    return site


def tables_of(root: nn.Module) -> dict[str, tuple[list[str], nn.Module]]:
    """Return the names of the tables of each collection of a model, and the collection, by path."""
    found: dict[str, tuple[list[str], nn.Module]] = {}
    for path, module in root.named_modules():
        if any(path.startswith(f"{above}.") for above in found):
            continue
        if isinstance(module, SplitCollection):
            found[path] = [config.name for config in module.parts().configs], module
        elif isinstance(module, FrozenModule):
            found[path] = list(module.frozen_tables()), module
        elif is_trained(module):
            found[path] = [config.name for config in configs_of(module)], module
    return found


def refresh(optimizer: Optimizer) -> None:
    """Have wrappers of optimizers (warm-up, clipping) see the tables that these have now."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, each in optimizer.optimizers:
            refresh(each)
    elif isinstance(optimizer, OptimizerWrapper):
        refresh(optimizer._optimizer)
        inner = optimizer._optimizer
        optimizer.params, optimizer.state, optimizer.param_groups = (
            inner.params,
            inner.state,
            inner.param_groups,
        )


def forget(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Drop a parameter and its state from an optimizer of a model that is not sharded."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, each in optimizer.optimizers:
            forget(each, parameter)
        return
    if isinstance(optimizer, OptimizerWrapper | KeyedOptimizerWrapper):
        forget(optimizer._optimizer, parameter)
    if hasattr(optimizer, "params"):
        optimizer.params = {key: each for key, each in optimizer.params.items() if each is not parameter}
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if each is not parameter]
    optimizer.state.pop(parameter, None)


def _check(site: Site) -> None:
    module, path = site.module, site.path
    if not path:
        raise TableError(f"{site.table}: the model is the collection itself; make it a part of a model")
    paths = [p for p, each in site.root.named_modules(remove_duplicate=False) if each is module]
    if len(paths) > 1:
        raise TableError(f"{site.name}: the collection is in the model under several names: {paths}")
    members = [each for each in module.modules() if is_trained(each) or isinstance(each, FrozenModule)]
    if any("forward" in vars(each) for each in members):
        raise TableError(
            f"{site.name}: the model is in a train pipeline, which has sent batches to the collection "
            f"already; let the pipeline end, then pipeline.detach(), and make a new pipeline afterwards"
        )
    dmp = site.dmp
    trained = [each for each in members if is_trained(each)]
    if dmp is None:
        sharded = [
            each for each in members if isinstance(each, SHARDED) or isinstance(each, ShardedFrozenModule)
        ]
        if sharded:
            raise TableError(f"{site.name}: is sharded; give the DistributedModelParallel that has it")
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise TableError(
                f"{site.name}: is not sharded, and every one of {dist.get_world_size()} ranks has a copy of "
                f"it; shard the model with DistributedModelParallel"
            )
        return
    if isinstance(dmp, DMPCollection) or dmp._env.process_group is None:
        raise TableError(f"{site.name}: tables of a {type(dmp).__name__} of this kind cannot be changed")
    if dmp.model_trackers:
        raise TableError(f"{site.name}: a delta tracker follows the collection; make the tracker afterwards")
    for each in trained:
        if not isinstance(each, SHARDED):
            raise TableError(
                f"{site.name}: is not sharded, and the data-parallel wrapper holds its parameters"
            )
        check_fused(each, path)
