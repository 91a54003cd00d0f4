"""Everything that can be known before a model is loaded, checked before it is: nothing fails first at step 1,000.

Runs on every rank alike and reads only small files (indexes, the model's configuration, JSON); what reads every byte
(checksums of shards and checkpoints) follows once the ranks have met, and is shared. Each error names the culprit.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lbr_dist.config import Recipe
from lbr_dist.data.loader import check_processes
from lbr_dist.data.plan import Plan, open_data
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import check_file
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.model.hub import cached_first
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.training.ds_config import Regime, load_regime, name_accelerator, versions
from lbr_dist.training.origin import NOT_THE_MODEL, check_resumed_model, check_start
from lbr_dist.training.run_folder import check_folder, has_run
from lbr_dist.training.run_recipe import FOLDERS, SET_PATH, covered, flat

OWN = ("output", "data.workers", "data.prefetch", "data.cache_dir", "data.cache_gib", "tracking", *FOLDERS)
"""Recipe fields that a rank may have for itself. What lies in the folders is compared by content."""

OWN_DISK = ("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path")
"""DeepSpeed settings that a rank may have for itself."""

COMPILED_MIN = 10
"""What is being compiled for longer is not: an operator takes a minute or two."""


@dataclass(frozen=True)
class Job:
    """A checked recipe and what the checks opened."""

    recipe: Recipe
    environment: Environment
    regime: Regime
    tokenization: Tokenization
    plan: Plan
    readers: list[ShardReader]
    allow_change: tuple[str, ...]
    then: Recipe | None = None
    """The run that is to begin with this one's weights, where there is one."""

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.total_steps(self.recipe.duration)


def check(
    recipe: Recipe,
    environment: Environment,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    then: Recipe | None = None,
    ahead: bool = False,
    refused: list[str] | None = None,
) -> Job:
    """Check a recipe against its output folder, model, data, DeepSpeed file and machine.

    Args:
        recipe: of the run.
        environment: this rank.
        resume: see `train`.
        allow_change: see `train`.
        then: see `train`; it is checked later, once the ranks have met.
        ahead: whether what is in `model.start_from` is still to be made.
        refused: gets why a start in an output folder that holds a run would be refused; None: that is an error.

    Raises:
        UserError: the first thing found that cannot work, with the remedy.
    """
    import torch

    cuda = torch.cuda.is_available()
    with _noting(refused if has_run(Path(recipe.output)) else None):
        check_folder(recipe, resume=resume, allow_change=allow_change)
    if "contrastive" in recipe.tasks and recipe.batch.global_batch == 1 and not recipe.contrastive.hard_negatives:
        raise UserError(
            "batch.global_batch is 1: a pair alone has no negatives, and its loss is 0; raise it, or set "
            "contrastive.hard_negatives"
        )
    regime = load_regime(recipe, world=environment.world, cuda=cuda)
    check_nvme(recipe, regime)
    check_processes(recipe.data.workers)
    tokenization = _check_model(recipe)
    if not refused:
        with _noting(refused):
            check_resumed_model(recipe, resume, allow_change)
    starts = recipe.model.start_from is not None and not ahead
    endless = "generative" in recipe.tasks and tokenization.eos_id is None
    if (starts or endless) and (refused or not resumes(recipe, resume)):
        if endless:
            _check_end(recipe.model.path)
        if starts:
            check_start(recipe, allow_change)
    plan, readers = open_data(recipe, tokenization)
    return Job(recipe, environment, regime, tokenization, plan, readers, tuple(allow_change), then)


@contextlib.contextmanager
def _noting(refused: list[str] | None) -> Iterator[None]:
    """Note an error, where there is a list for it."""
    try:
        yield
    except UserError as error:
        if refused is None:
            raise
        refused.append(str(error))


def complete(recipe: Recipe, allow_change: Sequence[str] = ()) -> bool:
    """Whether the output folder holds this recipe's run with all its steps, as far as its newest checkpoint says.

    False also where that cannot be told from here: the run itself names what is wrong.
    """
    from lbr_dist.training.checkpoint.format import verify
    from lbr_dist.training.checkpoint.listing import list_checkpoints

    path, newest = next(iter(list_checkpoints(recipe.output)), (Path(), None))
    if newest is None or verify(path, deep=False):
        return False
    try:
        check_folder(recipe, resume="auto", allow_change=allow_change)
        plan, _ = open_data(recipe, _check_model(recipe))
    except UserError:
        return False
    return newest.step >= plan.total_steps(recipe.duration) and newest.state["plan"] == plan.fingerprint


def resumes(recipe: Recipe, resume: str) -> bool:
    """Whether the weights come from a checkpoint of this run: what it started from may be gone."""
    from lbr_dist.training.checkpoint.listing import list_checkpoints

    return resume not in ("auto", "never") or (resume == "auto" and bool(list_checkpoints(recipe.output)))


def _check_model(recipe: Recipe) -> Tokenization:
    from lbr_dist.model.backbone import check_adapters, load_config
    from lbr_dist.model.bottleneck import longest_sequence

    settings = load_config(recipe.model.path, longest_sequence(recipe))
    nested = recipe.contrastive.matryoshka if recipe.stage != "generative" else None
    if nested is not None and max(nested.dims) > settings.hidden_size:
        raise UserError(
            f"contrastive.matryoshka.dims has {max(nested.dims)}, but the embeddings of model {recipe.model.path} have "
            f"{settings.hidden_size} dimensions: leave it out"
        )
    tokenization = Tokenization.load(recipe.model.path)
    if tokenization.vocabulary > settings.vocab_size:
        raise UserError(
            f"model {recipe.model.path}: its tokenizer has {tokenization.vocabulary} tokens and the model "
            f"{settings.vocab_size}: the folder mixes two models"
        )
    check_adapters(recipe.model, settings)
    return tokenization


def _check_end(path: str) -> None:
    """Check that a model whose tokenizer names no end-of-sequence token knows none either: answers would lack it.

    Raises:
        UserError: it does.
    """
    from transformers import PretrainedConfig

    named = cached_first(PretrainedConfig.get_config_dict, path)[0].get("eos_token_id")  # a family may have a default
    if named is not None:
        raise UserError(
            f"model {path}: its config.json has eos_token_id {named}, but its tokenizer names no end-of-sequence "
            "token: tokenizer_config.json is missing there, or has no eos_token; copy the model's own"
        )


def check_nvme(recipe: Recipe, regime: Regime) -> None:
    """Check what offload to NVMe needs: a folder to write to, and what DeepSpeed compiles its operator from.

    Raises:
        UserError: names the setting, or what to install; or weights that a checkpoint could not read there.
    """
    if recipe.model.lora is not None and regime.on_disk("offload_param"):
        raise UserError(
            f"deepspeed {regime.name}: offload_param to nvme puts the frozen weights of model.lora where checkpoints "
            "cannot read them: offload_param to cpu"
        )
    for part in ("offload_optimizer", "offload_param"):
        if regime.on_disk(part):
            path = regime.config["zero_optimization"][part].get("nvme_path")
            if path is None or not os.access(path, os.W_OK):
                raise UserError(
                    f"deepspeed {regime.name}: zero_optimization.{part}.nvme_path is {path}, which is not a folder "
                    "that can be written: copy the file and name a folder on a local disk"
                )
            _check_async_io(regime)


def _check_async_io(regime: Regime) -> None:
    name_accelerator()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if not builder.is_compatible(verbose=False):
        raise UserError(
            f"deepspeed {regime.name}: offload to nvme needs libaio with its header and a C++ compiler (Debian: apt "
            "install libaio-dev g++; elsewhere, name the places in CFLAGS, LDFLAGS, CPATH and LIBRARY_PATH), or "
            "offload to cpu"
        )
    _check_build_folder(builder.name)


def _check_build_folder(operator: str) -> None:
    """Check the folder in which torch compiles an operator: it waits for ever for a lock that a killed start left."""
    from torch.utils import cpp_extension

    try:
        lock = Path(cpp_extension._get_build_directory(operator, False)) / "lock"
    except OSError as error:
        raise UserError(
            f"{error.filename}: DeepSpeed cannot compile {operator} there ({error.strerror}); set TORCH_EXTENSIONS_DIR"
        ) from None
    with contextlib.suppress(FileNotFoundError):
        if (minutes := (time.time() - lock.stat().st_mtime) / 60) > COMPILED_MIN:
            raise UserError(
                f"{lock}: is {minutes:.0f} minutes old, left behind by a process that was killed while it compiled "
                f"DeepSpeed's {operator}; remove it"
            )


def same_everywhere(job: Job) -> dict[str, str]:
    """What all ranks must agree on, by its name in messages.

    Versions, recipe fields, the data and its order, the model's configuration, the tokens around a text and what
    DeepSpeed is given.
    """
    from lbr_dist.model.backbone import load_config

    fields = flat(job.recipe.model_dump(mode="json"))
    own = {name for name in fields if covered(name, OWN) or SET_PATH.fullmatch(name)}
    named = {**versions(), **{name: fields[name] for name in fields if name not in own}, **job.plan.identity}
    named |= {"tokenizer: bos": job.tokenization.bos, "tokenizer: eos_id": job.tokenization.eos_id}
    for origin, settings, free in (
        ("config.json", load_config(job.recipe.model.path, 0).to_dict(), NOT_THE_MODEL),
        ("DeepSpeed file", job.regime.config, OWN_DISK),
    ):
        named |= {f"{origin}: {name}": value for name, value in flat(settings).items() if not covered(name, free)}
    return {"host": socket.gethostname(), **{name: str(value) for name, value in named.items()}}


def disagreement(found: Sequence[Mapping[str, str]]) -> str:
    """The first rank whose `same_everywhere` is not rank 0's, and in what, in words; "" where there is none."""
    first = found[0]
    for rank, other in enumerate(found):
        names = [name for name in sorted({*first, *other} - {"host"}) if other.get(name) != first.get(name)]
        if names:
            listed = "; ".join(f"{name} is {other.get(name)} and not {first.get(name)}" for name in names[:3])
            return (
                f"rank {rank} on {other['host']} is set up otherwise than rank 0 on {first['host']} ({listed}): give "
                "all ranks the same recipe, model, DeepSpeed file, prepared sets and versions"
            )
    return ""


def deep_check(job: Job) -> None:
    """Compare every byte of the shards that the run reads with its checksum; each rank takes its share of the shards.

    Remote shards are compared when they are fetched.

    Raises:
        UserError: names a damaged file.
    """
    shards = [
        (reader.opened, shard)
        for reader in job.readers
        if not reader.opened.is_remote
        for shard in reader.opened.splits[reader.split].shards
    ]
    for opened, shard in shards[job.environment.rank :: job.environment.world]:
        for name, _, expected in shard.files:
            check_file(Path(opened.address(name)), expected)
