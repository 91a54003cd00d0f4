"""What a checkpoint sees of an engine: its weights and optimizer moments as slices of named parameters.

The part that knows torch's optimizers but not DeepSpeed; `zero_state` fills in where each ZeRO stage keeps its share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.format import OptimizerEntry, Parameter
from lbr_dist.training.checkpoint.tensor_file import NAMES

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
Family = Literal["adam", "sgd"]
FAMILIES: dict[str, Family] = {"AdamW": "adam", "Adam": "adam", "SGD": "sgd"}
MOMENTS: dict[Family, tuple[str, ...]] = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
WEIGHT = "weight"


class EngineShapeError(RuntimeError):
    """DeepSpeed does not look as `zero_state` expects it to."""


@dataclass(frozen=True)
class Piece:
    """The elements [start, end) of a flat parameter that this rank holds, with views of their data.

    `tensors` maps "weight" and the moments' names to 1-D views of `end - start` elements: reading them reads the
    engine, writing to them changes it. [own_start, own_end) is the part of it that this rank writes to a checkpoint;
    over all ranks these parts tile the parameter.
    """

    name: str
    start: int
    end: int
    own_start: int
    own_end: int
    tensors: dict[str, torch.Tensor]

    def owned(self, key: str) -> torch.Tensor:
        """The view of this rank's own part."""
        return self.tensors[key][self.own_start - self.start : self.own_end - self.start]


def equal_run(numel: int, rank: int, world: int) -> tuple[int, int]:
    """[start, end) of `rank`'s run when `numel` elements are cut into `world` equal runs, the last ones shorter."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


class EngineState(ABC):
    """What a checkpoint saves of an engine, and where a load puts it.

    `pieces` and `loaded` are collective (offload and gathering), the rest is not.
    """

    def __init__(self, engine: Any, rank: int, world: int):
        self.engine, self.rank, self.world = engine, rank, world
        self.zero: Any = engine.optimizer
        self.names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.family = _family(self.base_optimizer)
        self.check()

    @property
    @abstractmethod
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, whose state is keyed by flat tensors."""

    @abstractmethod
    def check(self) -> None:
        """Raise EngineShapeError if DeepSpeed's structures are not as expected."""

    @abstractmethod
    def flat_tensors(self) -> list[torch.Tensor]:
        """The tensors that the base optimizer steps on this rank."""

    @abstractmethod
    def pieces(self, optimizer: OptimizerEntry | None, *, store: bool) -> Iterator[Piece]:
        """This rank's pieces of the trained parameters: float32 masters and, with `optimizer`, its moments.

        A piece's views are valid until the next one is taken. With `store`, the optimizer is first given the state
        that `optimizer` describes, and what the caller writes to the views is kept.
        """

    @abstractmethod
    def loaded(self) -> None:
        """Make the model's own copies of the weights follow the masters that were just written."""

    def shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(parameter.shape)

    def frozen(self) -> Iterator[Piece]:
        """Pieces of the parameters that are not trained, in the model's own dtype."""
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                own = equal_run(parameter.numel(), self.rank, self.world)
                yield Piece(name, 0, parameter.numel(), *own, {WEIGHT: parameter.data.view(-1)})

    def parameters(self) -> list[Parameter]:
        """Every parameter of the model, tied ones once, in the order of the model."""
        return [
            Parameter(
                name=name,
                shape=self.shape(parameter),
                dtype="F32" if parameter.requires_grad else NAMES[parameter.dtype],
                trained=parameter.requires_grad,
            )
            for name, parameter in self.engine.module.named_parameters()
        ]

    def tied(self) -> dict[str, str]:
        """Second names of parameters, to their first."""
        every = self.engine.module.named_parameters(remove_duplicate=False)
        return {name: self.names[id(p)] for name, p in every if self.names[id(p)] != name}

    def optimizer_entry(self) -> OptimizerEntry:
        """What the optimizer holds now; the same on every rank."""
        states = [self.base_optimizer.state.get(flat, {}) for flat in self.flat_tensors()]
        kept = {tuple(key for key in MOMENTS[self.family] if torch.is_tensor(state.get(key))) for state in states}
        steps = {float(state["step"]) for state in states if "step" in state}
        if len(steps) > 1 or len(kept) > 1:
            raise EngineShapeError(f"parameter groups differ in their steps {sorted(steps)} or moments {sorted(kept)}")
        keys = list(kept.pop()) if kept else []
        return OptimizerEntry(family=self.family, keys=keys, step=steps.pop() if steps else None)

    def _prepare(self, flat: torch.Tensor, optimizer: OptimizerEntry) -> None:
        """Give one flat tensor the state that `optimizer` describes, its moments still to be filled.

        The optimizer allocates its state in its first step, so a fresh engine has none; and the step count must be
        a tensor of its own in each state, or a shared one advances once per group.
        """
        if not optimizer.keys and optimizer.step is None:
            self.base_optimizer.state.pop(flat, None)
            return
        state = self.base_optimizer.state[flat]
        for key in optimizer.keys:
            if not torch.is_tensor(state.get(key)):
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if optimizer.step is not None:
            state["step"] = self._step_value(flat, optimizer.step)

    def _views(self, flat: torch.Tensor, optimizer: OptimizerEntry | None, store: bool) -> dict[str, torch.Tensor]:
        views = {WEIGHT: flat.data.view(-1)}
        if optimizer is not None:
            if store:
                self._prepare(flat, optimizer)
            views.update({key: self.base_optimizer.state[flat][key].view(-1) for key in optimizer.keys})
        return views

    def _step_value(self, flat: torch.Tensor, step: float) -> torch.Tensor:
        group = self.base_optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        return torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu")

    def counters(self) -> dict[str, int]:
        """The engine's own step counters."""
        return {name: int(getattr(self.engine, name)) for name in COUNTERS}

    def set_counters(self, values: dict[str, int]) -> None:
        """Put them back; accumulation starts at a step's first micro-batch."""
        for name in COUNTERS:
            setattr(self.engine, name, values[name])
        self.engine.micro_steps = 0

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise EngineShapeError(what)


def _family(optimizer: torch.optim.Optimizer) -> Family:
    name = type(optimizer).__name__
    if name not in FAMILIES:
        raise UserError(f"checkpoints: optimizer {name} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
