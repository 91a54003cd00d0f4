"""Any Hugging Face model as it is, to read from and not to train: in float32, whole, and on a device that there is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError

from lbr_dist.errors import UserError, one_line
from lbr_dist.model.hub import cached_first

POOLER = "pooler."
"""Weights of BERT's family that our poolings do not use, and that many checkpoints lack."""


def position_limit(settings: Any) -> int | None:
    """Most tokens that a model has positions for, by its configuration; None: no limit (BLOOM; XLNet says -1)."""
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    limit: int | None = next((known for name in names if (known := getattr(settings, name, None))), None)
    return limit if limit and limit > 0 else None


def load_plain(kind: Any, path: str, device: torch.device | str, what: str) -> Any:
    """Load a model of `kind` (`transformers.AutoModel` or one for a task).

    Args:
        path: model folder or hub name.
        device: where to.
        what: names the model in messages.

    Raises:
        UserError: it cannot be loaded, or weights are missing, which transformers would make up at random.
    """
    try:
        with without_report():
            model, info = cached_first(
                kind.from_pretrained, path, dtype="float32", output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(f"{what}: cannot be loaded ({reason})") from None
    _check_whole(info, what)
    return model.eval().to(device)


@contextlib.contextmanager
def whole_models(what: str) -> Iterator[None]:
    """Within it, whatever loads a transformers model refuses one with missing weights; `what` names it in messages.

    Raises:
        UserError: weights are missing.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def load_whole(cls: type, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        with without_report():
            model, info = load(cls, *arguments, output_loading_info=True, **options)
        _check_whole(info, what)
        return (model, info) if output_loading_info else model

    with patch.object(PreTrainedModel, "from_pretrained", classmethod(load_whole)):
        yield


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Within it transformers does not list what it left unread: to embeddings a language model's own head is that."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_whole(info: dict[str, Any], what: str) -> None:
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(POOLER))
    if missing:
        raise UserError(f"{what}: {len(missing)} weights are missing, the first is {missing[0]}; download it again")


def usable_device(device: str | None) -> str:
    """The device that the user named, tried out; `cuda` where there is one if none was named.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError("neither cpu nor cuda")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"--device {device}: cannot be used ({reason}); expected cpu, cuda or cuda:N") from None
    return device
