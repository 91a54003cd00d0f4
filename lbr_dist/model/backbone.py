"""Load the causal language model that carries the method, and refuse early what would fail late.

Families are those whose forward was read and tested here: their decoder layers hand keyword arguments down to the
attention function, apply no mask of their own, and have a plain linear head. Everything that can be known from the
model's configuration is checked before any weight is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from lbr_dist import config
from lbr_dist.environment import lost_contact, out_of_memory
from lbr_dist.errors import UserError, one_line
from lbr_dist.model import attention
from lbr_dist.model.head import LossHead
from lbr_dist.model.hub import cached_first, snapshot

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("lbr")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""One of these files is in every folder that transformers reads weights from."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def load_backbone(
    model: config.Model, *, for_zero3: bool = False, longest: int = 0, seed: int = 0
) -> PreTrainedModel | PeftModel:
    """Load the model with our attention and loss head, and with adapters where the recipe asks for them.

    Args:
        model: the recipe's section.
        for_zero3: the caller holds a `transformers.integrations.HfDeepSpeedConfig` alive: weights are loaded sharded.
        longest: tokens of the longest sequence that will be seen.
        seed: of the adapters' initial weights.

    Raises:
        UserError: not a model folder, an adapter in it, an unsupported family, quantized weights, too few positions,
            missing, broken or contradictory weights, LoRA settings that do not fit the model.
        RuntimeError: another rank is gone (weights are loaded sharded by collective calls), or memory does not suffice.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    if for_zero3 != is_deepspeed_zero3_enabled():
        raise RuntimeError("for_zero3 must go with a living HfDeepSpeedConfig of stage 3")
    attention.register()
    settings = load_config(model.path, longest)
    two_heads = UserError(
        f"model {model.path}: its config.json ties the head to the embedding (tie_word_embeddings), but its files hold "
        "another head; set tie_word_embeddings to false there, or take lm_head.weight out of the files"
    )
    try:
        if settings.tie_word_embeddings and _head_of_its_own(model.path):
            raise two_heads
        loaded: Any = cached_first(
            AutoModelForCausalLM.from_pretrained,
            model.path,
            config=settings,
            dtype=DTYPES[model.dtype],
            attn_implementation=attention.NAME,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and (lost_contact(error) or out_of_memory(error)):
            raise
        raise UserError(
            f"model {model.path}: its weights cannot be loaded ({one_line(error)}); download it again"
        ) from None
    backbone, info = loaded
    _check_whole(info, settings, f"model {model.path}")
    one = for_zero3 or backbone.lm_head.weight is backbone.get_input_embeddings().weight
    if settings.tie_word_embeddings and not one:  # of files that are no safetensors
        raise two_heads
    return equip(backbone, model, seed)


def _check_whole(info: dict[str, Any], settings: PretrainedConfig, what: str) -> None:
    """Every weight is there, and the configuration has a place for each one of its layers."""
    if missing := sorted(info["missing_keys"]):
        remedy = "download it again"
        if missing == ["lm_head.weight"]:  # an embedder, saved without
            remedy = "name the language model that it was made of, which has a head"
        raise UserError(f"{what}: {len(missing)} weights are missing, the first is {missing[0]}; {remedy}")
    layers = ((name, _LAYER.search(name)) for name in sorted(info["unexpected_keys"]) if "rotary_emb" not in name)
    left = [name for name, layer in layers if layer and int(layer[1]) < settings.num_hidden_layers]
    if left:
        raise UserError(
            f"{what}: its config.json has no place for {len(left)} of its weights, the first is {left[0]}; give it the "
            "config.json that belongs to them"
        )


def equip(backbone: PreTrainedModel, model: config.Model, seed: int) -> PreTrainedModel | PeftModel:
    """Put our head on a plain model, then checkpointing and adapters as the recipe says."""
    backbone.lm_head = LossHead(backbone.lm_head)
    backbone.config.use_cache = False
    if model.activation_checkpointing:
        old = backbone.gradient_checkpointing_enable  # its name until transformers 5.22, which 5.23 warns of
        getattr(backbone, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if model.lora is None:
        return backbone
    if found := _matched(backbone, model.lora.train_modules):
        log.info("model.lora.train_modules: matches %s", found)
    return _with_lora(backbone, model, model.lora, seed)


def check_adapters(model: config.Model, settings: PretrainedConfig) -> None:
    """Put the recipe's adapters on a model that is made from its configuration alone, without weights.

    Raises:
        UserError: they do not fit.
    """
    from transformers import AutoModelForCausalLM

    if model.lora is not None:
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(settings)
        _with_lora(bare, model, model.lora, seed=0)


def load_config(path: str, longest: int) -> PretrainedConfig:
    """Read and check a model's configuration.

    Raises:
        UserError: see `load_backbone`.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        _check_no_adapter(path)
        family = cached_first(PretrainedConfig.get_config_dict, path)[0].get("model_type")
        if family is None or family in FAMILIES:  # others may be unknown to transformers, and bring code of their own
            settings = cached_first(AutoConfig.from_pretrained, path, trust_remote_code=False)
            family = settings.model_type
    except (OSError, ValueError, KeyError) as error:
        elsewhere = "" if Path(path).exists() else ", nor a hub name in its cache or on the hub"
        raise UserError(
            f"model {path}: not a model folder{elsewhere} ({one_line(error)}); give a folder with config.json and "
            "weights"
        ) from None
    if family not in FAMILIES:
        raise UserError(f"model {path}: family {family} is not supported; use a model of {', '.join(FAMILIES)}")
    quantized = settings.to_dict().get("quantization_config")
    if quantized:
        raise UserError(
            f"model {path}: its weights are quantized ({quantized.get('quant_method')}), which cannot be trained; use "
            "the model that it was made of, in bfloat16 or float32"
        )
    if longest > settings.max_position_embeddings:
        raise UserError(
            f"model {path}: has {settings.max_position_embeddings} positions, but a sequence may take {longest}; "
            "lower data.max_x_tokens or data.max_y_tokens"
        )
    window = _window(settings)
    if window is not None and longest > window:
        raise UserError(
            f"model {path}: its layers see {window} tokens back (sliding window), but a sequence may take {longest}; "
            "lower data.max_x_tokens or data.max_y_tokens, or set sliding_window to null in its config.json (Qwen: "
            "use_sliding_window to false)"
        )
    short = _original_length(settings)
    if short is not None and longest > short:
        raise UserError(
            f"model {path}: with longrope a text's positions depend on whether its batch holds a sequence of more than "
            f"{short} tokens, and one may take {longest}; lower data.max_x_tokens or data.max_y_tokens"
        )
    settings.attention_dropout = 0.0
    return settings


def longest_context(settings: PretrainedConfig) -> int:
    """Tokens of the longest sequence whose parts all see each other, at positions that are its own."""
    limits = (settings.max_position_embeddings, _window(settings), _original_length(settings))
    return min(limit for limit in limits if limit is not None)


def _check_no_adapter(path: str) -> None:
    """transformers by itself puts an adapter that lies in the folder on the weights, and freezes these."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if cached_first(find_adapter_config_file, path) is None:
        return
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in WEIGHTS):
        raise UserError(
            f"model {path}: is an adapter (adapter_config.json) without the weights that it belongs to; merge it into "
            "them (peft's merge_and_unload), and give the folder of the merged model"
        )
    raise UserError(
        f"model {path}: has an adapter (adapter_config.json) beside its weights, which would be put on them, again if "
        "they were merged with it; save the merged model in a folder of its own, or move adapter_config.json away"
    )


def _head_of_its_own(path: str) -> bool:
    """Whether the safetensors files of a model hold a head beside the embedding that differs from it.

    transformers then ties them or not by the ZeRO stage (partitioned, the two cannot be compared), and a model that is
    made from the configuration alone always does.
    """
    from safetensors import safe_open

    folder = Path(path) if Path(path).is_dir() else snapshot(path)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        for file in _weight_files(folder) if folder else []:
            tensors = opened.enter_context(safe_open(file, framework="pt"))
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                    found[name.rpartition(".")[0].rpartition(".")[2]] = tensors.get_slice(name)
        if len(found) < 2:
            return False
        head, embedding = found["lm_head"], found["embed_tokens"]
        if head.get_shape() != embedding.get_shape():
            return True
        parts = (slice(low, low + 4096) for low in range(0, head.get_shape()[0], 4096))
        return not all(torch.equal(head[part].float(), embedding[part].float()) for part in parts)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a folder; others may lie there, as an adapter's."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.is_file():
        return [file]
    names = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ()
    return [folder / name for name in sorted(set(names))]


def _window(settings: PretrainedConfig) -> int | None:
    """Tokens that a sliding-window layer sees, None without such layers (of Mistral, all layers or none have it)."""
    if settings.model_type == "mistral":
        return settings.sliding_window
    layers: list[str] = settings.to_dict().get("layer_types") or []
    return settings.sliding_window if "sliding_attention" in layers else None


def _original_length(settings: PretrainedConfig) -> int | None:
    """Tokens up to which longrope gives a text the same positions in every batch, None with other positions."""
    rope: dict[str, Any] = settings.to_dict().get("rope_parameters") or {}
    return rope.get("original_max_position_embeddings", 0) if rope.get("rope_type") == "longrope" else None


def _with_lora(backbone: PreTrainedModel, model: config.Model, lora: config.Lora, seed: int) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    _check_modules(backbone, model.path, lora)
    tied = {"embed_tokens", "lm_head"} & set(lora.train_modules)
    if tied and backbone.config.tie_word_embeddings:
        raise UserError(
            f"model.lora.train_modules: {min(tied)} is tied to the other end of model {model.path}, and would be torn "
            "from it; train another module, or all weights (no model.lora)"
        )
    adapters = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.train_modules or None,
        task_type="CAUSAL_LM",
    )
    own = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # by default every GPU is taken
    with torch.random.fork_rng(own), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks by the old name
        torch.manual_seed(seed)
        try:
            return get_peft_model(backbone, adapters, autocast_adapter_dtype=False)  # ZeRO-3 takes one dtype alone
        except ValueError as error:
            raise UserError(
                f"model.lora: does not fit model {model.path} ({one_line(error)}); "
                "set model.lora.target_modules to names of its linear layers, or to all-linear"
            ) from None


def _check_modules(backbone: PreTrainedModel, path: str, lora: config.Lora) -> None:
    """peft leaves out a name that no module has, unless it is the only one."""
    modules = dict(backbone.named_modules())
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    wanted = [("target_modules", one, f".{one}") for one in targets]  # as peft matches them
    wanted += [("train_modules", one, one) for one in lora.train_modules]
    for setting, one, end in wanted:
        if not any(f".{name}".endswith(end) for name in modules):
            own = {name.rpartition(".")[2] for name, module in modules.items() if module._parameters}
            raise UserError(
                f"model.lora: does not fit model {path} ({setting}: no module is called {one}); those with weights are "
                f"called {', '.join(sorted(own))}"
            )
    ends = [one for one in targets if one.split(".")[-1] in ("embed_tokens", "lm_head")]
    if ends:
        raise UserError(
            f"model.lora.target_modules: {ends[0]} cannot have an adapter, only the linear layers of model {path} "
            "between embedding and head can; leave it out, or train it whole (model.lora.train_modules)"
        )


def _matched(backbone: PreTrainedModel, ends: list[str]) -> str:
    """In words, the modules whose names end so, as peft matches them: `norm` is that of every layer, too."""
    found = Counter(name.rpartition(".")[2] for name, _ in backbone.named_modules() if name.endswith(tuple(ends)))
    listed = ", ".join(f"{name} ({count})" for name, count in found.most_common(8))
    return f"{listed} and {len(found) - 8} names more" if len(found) > 8 else listed


def causal_lm(backbone: nn.Module) -> Any:
    """The transformers model itself, adapters (if any) inside its layers."""
    peft = sys.modules.get("peft")  # not imported, which takes half a second, for a model that cannot be of it
    return backbone.get_base_model() if peft and isinstance(backbone, peft.PeftModel) else backbone
