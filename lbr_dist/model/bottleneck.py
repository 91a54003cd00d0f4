"""The one module that trains: a causal language model with owned bottleneck vectors Z (paper section 3.2).

Z is a parameter of its own and not rows of the vocabulary, so that nothing resizes a (sharded) embedding and Z can have
its own learning rate; an export folds it into the embedding as added tokens. The forward pass calls the decoder and, in
`generate`, the head: always the same modules in the same order and once each, whatever the batch holds, because under
ZeRO-3 every rank must make the same calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.model import attention
from lbr_dist.model.backbone import DTYPES, causal_lm, equip, load_backbone, load_config
from lbr_dist.model.layout import PackedBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger("lbr")

Task = Literal["generate", "embed", "embed_with_temperature", "hidden"]
Pooling = Literal["bottleneck", "last", "mean"]


class LbrModel(nn.Module):
    """Backbone and bottleneck vectors. State names: `z` (where K > 0), `temperature` (if learned) and `backbone.*`.

    Attributes:
        backbone: transformers model of a supported family, or a peft model around one.
        z: K learned vectors [K, D], or None.
        temperature: [1], offset of the contrastive temperature's logarithm from the recipe's, or None. It is here and
            not in the objective so that it is sharded, saved and reduced as every other parameter.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        z_KD: Tensor | None,
        attention_setting: str = "auto",
        temperature_1: Tensor | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.z = None if z_KD is None else nn.Parameter(z_KD)
        self.temperature = None if temperature_1 is None else nn.Parameter(temperature_1)
        self._attention = attention_setting

    @classmethod
    def build(cls, recipe: Recipe, for_zero3: bool = False) -> Self:
        """The model that a recipe starts from: pretrained backbone, new Z.

        Args:
            recipe: the whole recipe; `model.start_from` is not read here.
            for_zero3: see `load_backbone`. Z itself is whole until DeepSpeed takes the model over.

        Raises:
            UserError: see `load_backbone`.
        """
        backbone = load_backbone(recipe.model, for_zero3=for_zero3, longest=longest_sequence(recipe), seed=recipe.seed)
        embedding = causal_lm(backbone).get_input_embeddings()
        count = recipe.bottleneck.count
        z_KD = initial_vectors(embedding.weight, count, recipe.seed) if count else None
        return cls(backbone, z_KD, recipe.model.attention, initial_temperature(recipe))

    @classmethod
    def restore(cls, recipe: Recipe, folder: str, weights: Iterable[tuple[str, Tensor]]) -> Self:
        """The model that a run left behind, for evaluation and export: no pretrained weights are read.

        Args:
            recipe: of the run.
            folder: its copy of the backbone's configuration (`config.json`).
            weights: (name, tensor) of the whole state, in any type; one of two tied names suffices.

        Raises:
            UserError: the weights do not fit the recipe (other bottleneck settings, another backbone).
        """
        from transformers import AutoModelForCausalLM

        attention.register()
        dtype = DTYPES[recipe.model.dtype]
        settings = load_config(folder, longest_sequence(recipe))
        plain = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention.NAME)
        count = recipe.bottleneck.count
        z_KD = torch.zeros(count, settings.hidden_size, dtype=dtype) if count else None
        model = cls(equip(plain, recipe.model, recipe.seed), z_KD, recipe.model.attention, initial_temperature(recipe))
        model.load_weights(weights)
        return model

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a state into this (unsharded) model; every parameter must be given, one of two tied names suffices.

        Raises:
            UserError: a name or shape that does not fit, a parameter that is not given, or two tied ones that differ.
        """
        own = dict(self.named_parameters(remove_duplicate=False))
        given: set[int] = set()
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                expected = tuple(own[name].shape) if name in own else "no such weight"
                raise UserError(
                    f"checkpoint: weight {name} of shape {tuple(tensor.shape)} does not fit this model ({expected}); "
                    "model.path and the bottleneck settings must be those of the run that wrote it"
                )
            if id(own[name]) in given and not torch.equal(own[name], tensor.to(own[name])):
                raise UserError(
                    f"checkpoint: weight {name} was trained apart from the one that its config.json ties it to: the "
                    "files of model.path held two; set tie_word_embeddings to false there, and train again"
                )
            with torch.no_grad():
                own[name].copy_(tensor)
            given.add(id(own[name]))
        missing = [name for name, parameter in own.items() if id(parameter) not in given]
        if missing:
            raise UserError(
                f"checkpoint: has no weight {missing[0]} ({len(missing)} missing); "
                "model.path and the bottleneck settings must be those of the run that wrote it"
            )

    def freeze_head(self) -> None:
        """Give a head of its own (not tied to the embedding) no gradients: a contrastive loss does not use it."""
        head = self.causal_lm.lm_head
        if self.causal_lm.config.tie_word_embeddings:
            return
        if self.backbone is not self.causal_lm and any(weight.requires_grad for weight in head.parameters()):
            log.info("model.lora.train_modules: lm_head is frozen all the same: a contrastive loss does not use it")
        head.requires_grad_(False)

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside, for export and generation."""
        return causal_lm(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: PackedBatch, task: Task, pooling: Pooling = "bottleneck") -> Tensor:
        """Run one packed micro-batch.

        Args:
            batch: on the model's device; S samples, T tokens, L targets.
            task: `generate`: the sum over the L targets of -log P(Y_t | Z, Y_<t) (paper equation 2), a float32 scalar;
                `embed`: one vector per sample, float32 [S, D], not normalised; `embed_with_temperature`: [S, D + 1],
                with `temperature` as one more column; `hidden`: the last hidden states [T, D].
            pooling: of `embed`. bottleneck and last: the last Z, or the last X of a sample without Z; mean: over X (a
                sample without X gives zeros).
        """
        hidden_TD = self.decode(batch)
        if task == "generate":
            return self.causal_lm.lm_head(hidden_TD[batch.loss_positions_L], batch.targets_L)
        if task == "hidden":
            return hidden_TD
        rows_SD = _mean(hidden_TD, batch) if pooling == "mean" else precise(hidden_TD[batch.pool_S])
        if task == "embed":
            return rows_SD
        assert self.temperature is not None
        return torch.cat([rows_SD, self.temperature.to(rows_SD.dtype).expand(len(rows_SD), 1)], dim=1)

    def decode(self, batch: PackedBatch, **options: Any) -> Tensor:
        """Last hidden states [T, D] of a batch; `options` go to the transformers decoder (a cache, say)."""
        model = self.causal_lm
        embeds_TD = model.get_input_embeddings()(batch.tokens_T)
        if self.z is not None:
            rows_N = batch.z_positions_N
            z_ND = precise(self.z)[batch.z_index_T[rows_N]]  # so that all texts' gradients are not summed in bfloat16
            embeds_TD = embeds_TD.index_copy(0, rows_N, z_ND.to(embeds_TD.dtype))
        output = model.model(
            inputs_embeds=embeds_TD.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            segments=batch.segments,
            backend=attention.choose_backend(self._attention, embeds_TD.device, embeds_TD.dtype),
            **{"use_cache": False, **options},
        )
        return output.last_hidden_state[0]


def precise(rows: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already."""
    return rows if rows.dtype == torch.float64 else rows.float()


def initial_temperature(recipe: Recipe) -> Tensor | None:
    """The parameter [1] of a learned temperature, at 0; None where it is not learned."""
    if recipe.stage == "generative" or recipe.contrastive.learn_temperature is None:
        return None
    return torch.zeros(1, dtype=DTYPES[recipe.model.dtype])


def longest_sequence(recipe: Recipe) -> int:
    """Most positions that one sample of this recipe takes."""
    answer = recipe.data.max_y_tokens if recipe.stage != "contrastive" else 0
    return recipe.data.max_x_tokens + recipe.bottleneck.count + answer


def initial_vectors(embedding_VD: Tensor, count: int, seed: int) -> Tensor:
    """New bottleneck vectors [count, D]: the mean embedding plus seeded noise of the embeddings' own spread.

    The mean alone is far shorter than any token, and the first normalisation would blow its gradient up; with the
    noise Z starts with the length of an ordinary token. Equal on every rank; a sharded embedding is gathered.
    """
    with _gathered(embedding_VD), torch.no_grad():
        mean_D = embedding_VD.mean(0, dtype=torch.float32).cpu()
        spread = sum(((rows.float().cpu() - mean_D) ** 2).sum() for rows in embedding_VD.split(4096))
        scale = (spread / embedding_VD.numel()) ** 0.5
    noise_KD = torch.randn(count, len(mean_D), generator=torch.Generator().manual_seed(seed))
    return (mean_D + scale * noise_KD).to(embedding_VD.dtype).to(embedding_VD.device)


def _gathered(parameter: Tensor) -> Any:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        from contextlib import nullcontext

        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _mean(hidden_TD: Tensor, batch: PackedBatch) -> Tensor:
    """Mean of the hidden states over each sample's X, in float32 (or float64) [S, D]."""
    lengths_S = batch.x_len_S + batch.z_len_S + batch.y_len_S
    x_len_T = batch.x_len_S.repeat_interleave(lengths_S, output_size=len(hidden_TD))
    in_x_TD = precise(hidden_TD) * (batch.positions_T < x_len_T)[:, None]
    sums_SD = torch.segment_reduce(in_x_TD, "sum", lengths=lengths_S, axis=0, unsafe=True)
    return sums_SD / batch.x_len_S.clamp(min=1)[:, None]
