"""Where each ZeRO stage of DeepSpeed keeps its share of weights and moments.

The only file that reads DeepSpeed's private attributes, for the version that pyproject.toml pins. DeepSpeed's own
ways to the same data do not do: its checkpoints refuse another world size, its universal format has silent bugs on
load, and `safe_get_full_*` gathers whole parameters. A changed DeepSpeed is found at construction (`EngineShapeError`),
before anything is written or overwritten.

ZeRO-3 cuts every parameter into equal runs, padded at the end; ZeRO-1/2 lays a group's parameters end to end and cuts
that; without ZeRO every rank has everything, and here writes an equal run of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.engine_state import WEIGHT, EngineShapeError, EngineState, Piece, equal_run
from lbr_dist.training.checkpoint.format import OptimizerEntry

SUPPORTED = "0.19.8"


class PlainState(EngineState):
    """Stage 0 in float32: a torch optimizer on the model's own parameters, the same on every rank."""

    @property
    @override
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.zero

    @override
    def check(self) -> None:
        self._require(isinstance(self.zero, torch.optim.Optimizer), "stage 0 wraps the optimizer")
        self._require(all(id(p) in self.names for p in self.flat_tensors()), "stage 0 steps on copies")

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return [p for group in self.zero.param_groups for p in group["params"] if p.requires_grad]

    @override
    def pieces(self, optimizer: OptimizerEntry | None, *, store: bool) -> Iterator[Piece]:
        for parameter in self.flat_tensors():
            views = self._views(parameter, optimizer, store)
            own = equal_run(parameter.numel(), self.rank, self.world)
            yield Piece(self.names[id(parameter)], 0, parameter.numel(), *own, views)

    @override
    def loaded(self) -> None:
        pass


class FlatState(EngineState):
    """Stages 1 and 2: a rank holds one run of each group's parameters laid end to end."""

    @property
    @override
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def _groups(self) -> Iterator[tuple[torch.Tensor, list[torch.nn.Parameter], list[int]]]:
        """(float32 partition, parameters, where each starts in the whole group) of every group."""
        if type(self.zero).__name__ == "BF16_Optimizer":
            for flat, parameters in zip(self.zero.fp32_groups_flat_partition, self.zero.bf16_groups, strict=True):
                yield flat, parameters, [0, *itertools.accumulate(p.numel() for p in parameters)][:-1]
        else:
            yield from zip(
                self.zero.single_partition_of_fp32_groups,
                self.zero.round_robin_bit16_groups,
                self.zero.round_robin_bit16_offsets,
                strict=True,
            )

    @override
    def check(self) -> None:
        for group, (flat, parameters, offsets) in enumerate(self._groups()):
            self._require(flat.dim() == 1 and flat.dtype == torch.float32, f"group {group} has no flat float32 masters")
            self._require(len(parameters) == len(offsets), f"group {group} has {len(offsets)} offsets")
            end = offsets[-1] + parameters[-1].numel()
            self._require(end <= flat.numel() * self.world, f"group {group}'s partitions are shorter than the group")

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return [flat for flat, _, _ in self._groups()]

    @override
    def pieces(self, optimizer: OptimizerEntry | None, *, store: bool) -> Iterator[Piece]:
        for flat, parameters, offsets in self._groups():
            begin = self.rank * flat.numel()
            sources = self._views(flat, optimizer, store)
            for parameter, offset in zip(parameters, offsets, strict=True):
                start = max(0, begin - offset)
                end = min(parameter.numel(), begin + flat.numel() - offset)
                if start < end:
                    at = offset + start - begin
                    views = {key: source[at : at + end - start] for key, source in sources.items()}
                    yield Piece(self.names[id(parameter)], start, end, start, end, views)

    @override
    def loaded(self) -> None:
        self.zero._hp_optimizer_states_linked = False
        self.zero.update_lp_params()


class Zero3State(EngineState):
    """Stage 3: a rank holds one run of every parameter; with NVMe offload, one sub-group in memory at a time."""

    @property
    @override
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    @override
    def check(self) -> None:
        parts = zip(self.zero.fp16_groups, self.zero.fp16_partitioned_groups_flat_numel, strict=True)
        for group, (parameters, numel) in enumerate(parts):
            total = sum(p.ds_tensor.ds_numel for p in parameters)
            self._require(total == numel, f"sub-group {group}'s partition has {numel} elements, not {total}")
            flat, swapped = self.flat_tensors()[group], self.zero._swappable_optimizer_subgroup(group)
            self._require(swapped or flat.shape == (numel,), f"sub-group {group}'s masters are {tuple(flat.shape)}")
            for parameter in parameters:
                found, expected = parameter.ds_tensor.ds_numel, -(-parameter.ds_numel // self.world)
                name = self.names[id(parameter)]
                self._require(found == expected, f"{name}'s partition has {found} elements, not {expected}")

    @override
    def flat_tensors(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    @override
    def shape(self, parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)  # type: ignore[attr-defined]

    @override
    def pieces(self, optimizer: OptimizerEntry | None, *, store: bool) -> Iterator[Piece]:
        for group, parameters in enumerate(self.zero.fp16_groups):
            swapped = self.zero._swappable_optimizer_subgroup(group)
            if swapped:
                self.zero._optimizer_states_and_gradient_swap_in(group)
            flat = self.zero.fp32_partitioned_groups_flat[group]
            sources = self._views(flat, optimizer, store)
            offset = 0
            for parameter in parameters:
                start, end = equal_run(parameter.ds_numel, self.rank, self.world)
                if start < end:
                    views = {key: source[offset : offset + end - start] for key, source in sources.items()}
                    yield Piece(self.names[id(parameter)], start, end, start, end, views)
                offset += parameter.ds_tensor.ds_numel
            if store:
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if swapped and store:
                self.zero._optimizer_states_and_gradient_swap_out(group)
            elif swapped:
                self.zero._release_swap_buffers(group)

    @override
    def frozen(self) -> Iterator[Piece]:
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                start, end = equal_run(parameter.ds_numel, self.rank, self.world)
                data = parameter.ds_tensor.data
                if data.numel() < end - start:
                    raise UserError(
                        f"checkpoints: {name} is frozen and offloaded to NVMe; offload_param to cpu instead"
                    )
                if start < end:
                    yield Piece(name, start, end, start, end, {WEIGHT: data[: end - start]})

    @override
    def loaded(self) -> None:
        # Drop gathered copies of the old weights. The small parameters that stay whole are not gathered again here, as
        # DeepSpeed's own epilogue would: the first forward pass does it, and learns from parameters that are not there
        # which modules read another's weight (peft's LoRA layers do); else its trace breaks at the second pass.
        self.zero.checkpoint_event_prologue()
        self.zero.invalidate_secondary_tensor()


_CLASSES: dict[str, Callable[[Any, int, int], EngineState]] = {
    "DeepSpeedZeroOptimizer_Stage3": Zero3State,
    "DeepSpeedZeroOptimizer": FlatState,
    "BF16_Optimizer": FlatState,
}


def open_engine(engine: Any, rank: int, world: int) -> EngineState:
    """The view of a DeepSpeed engine, whatever its stage.

    Raises:
        EngineShapeError: DeepSpeed's internals are not as expected.
        UserError: the engine cannot be checkpointed (an unsupported optimizer, or bf16 without ZeRO).
    """
    name = type(engine.optimizer).__name__
    if name in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        raise UserError(
            "checkpoints: bfloat16 with DeepSpeed stage 0 keeps its masters whole on every rank; use stage 1"
        )
    try:
        return _CLASSES.get(name, PlainState)(engine, rank, world)
    except (AttributeError, KeyError, EngineShapeError) as error:
        import deepspeed

        raise EngineShapeError(
            f"checkpoints read the partitions of DeepSpeed {SUPPORTED}, and the installed {deepspeed.__version__} is "
            f"shaped otherwise ({error}): install deepspeed=={SUPPORTED}, or adapt {Path(__file__).name}"
        ) from error
