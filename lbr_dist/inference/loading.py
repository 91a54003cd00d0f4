"""From what a user types to a model: a run, a checkpoint, an export, any sentence-transformers model, hf:... or bm25.

This is above training because it knows both checkpoints and encoders, which do not know each other.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl

import xxhash

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.inference.identity import folders, identity, origins
from lbr_dist.inference.model_folder import damage, damaged_export, is_export
from lbr_dist.recipes import load_recipe

if TYPE_CHECKING:
    from lbr_dist.inference.encoder import Encoder, PackedEncoder
    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.model.tokenizer import Tokenization

HF_MAX_TOKENS = 512
"""Longest text of an hf: model, in tokens, unless the specification says max_tokens=N."""
HF_VERSION = 2
"""Raised when such a model gives a text another vector: nothing that was kept is joined with it."""


@dataclass
class Run:
    """A trained model as a run left it.

    Attributes:
        name: for tables.
        checkpoint: folder that the weights came from.
        recipe: of the run.
        model: with its weights.
        tokenization: of its tokenizer.
        digest: of the checkpoint: `model_fingerprint`.
    """

    name: str
    checkpoint: Path
    recipe: Recipe
    model: LbrModel
    tokenization: Tokenization
    digest: str

    @property
    def model_dir(self) -> Path:
        """Configuration and tokenizer of the backbone."""
        return self.checkpoint / "model"

    def encoder(self) -> PackedEncoder:
        """The run as an encoder.

        Raises:
            UserError: the run's number of bottleneck tokens goes by a surprisal model that is not there any more.
        """
        from lbr_dist.inference.encoder import PackedEncoder

        surprisal = self.recipe.bottleneck.by_surprisal
        if surprisal is not None:
            _check_surprisal_model(self.checkpoint, surprisal.model)
        encoder = PackedEncoder(self.model, self.tokenization, self.recipe, self.name)
        encoder.checkpoint = {"name": self.checkpoint.name, "digest": self.digest}
        return encoder


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run folder or one of its checkpoints."""
    folder = Path(path)
    return (folder / "checkpoints").is_dir() or ((folder / "recipe.yaml").is_file() and (folder / "model").is_dir())


def load_run(path: str | Path, device: str = "cpu", checkpoint: str | Path | None = None) -> Run:
    """Load a run's newest checkpoint, or the checkpoint that `path` is, or the one of the run that is given.

    On a CPU, and for an export, the weights are float32 whatever the recipe says (bfloat16 is slower there), and the
    attention is the one that a CPU has.

    Raises:
        UserError: there is no complete checkpoint, or it does not fit its recipe.
    """
    from lbr_dist.training.checkpoint.chosen import with_checkpoint

    return with_checkpoint(
        path if checkpoint is None else checkpoint, lambda found: _load_checkpoint(Path(path), found, device)
    )


def _load_checkpoint(path: Path, checkpoint: Path, device: str) -> Run:
    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.model.tokenizer import Tokenization
    from lbr_dist.training.checkpoint.weights import iterate_weights

    recipe = load_recipe(checkpoint / "recipe.yaml", kept=True)
    here = recipe
    if device == "cpu":
        on_cpu = recipe.model.model_copy(update={"dtype": "float32", "attention": "auto"})
        here = recipe.model_copy(update={"model": on_cpu})
    folder = str(checkpoint / "model")
    model = LbrModel.restore(here, folder, iterate_weights(checkpoint)).to(device).eval()
    name, digest = _run_name(path, recipe), model_fingerprint(str(checkpoint))
    return Run(name, checkpoint, recipe, model, Tokenization.load(folder), digest)


def load_encoder(spec: str, device: str | None = None, checkpoint: str | None = None) -> Encoder:
    """An encoder from its specification.

    Args:
        spec: a run, a checkpoint, an export or other sentence-transformers folder, a hub name, or
            `hf:PATH?pooling=mean|last[&max_tokens=N]` for any causal language model; each with `?dim=N` (after
            hf: options `&dim=N`) for the first N dimensions of its embeddings.
        device: default: CUDA where there is one.
        checkpoint: of a run, instead of its newest.

    Raises:
        UserError: it is none of these, has fewer dimensions, or there is no such device.
    """
    from lbr_dist.inference.encoder import SentenceTransformerEncoder, TruncatedEncoder
    from lbr_dist.model.plain import usable_device

    device = usable_device(device)
    spec, dim = split_dim(spec)
    if dim is not None:
        return TruncatedEncoder(load_encoder(spec, device, checkpoint), dim)
    check_spec(spec)
    if spec.startswith("hf:"):
        return _hf_encoder(spec, device)
    if is_run(spec):
        return load_run(spec, device, checkpoint).encoder()
    return SentenceTransformerEncoder(spec, device)


def pinned(spec: str) -> str:
    """A specification that goes on meaning the same model: a run becomes its newest verified checkpoint.

    Raises:
        UserError: the run has none.
    """
    path, dim = split_dim(spec)
    if not is_run(path):
        return spec
    from lbr_dist.training.checkpoint.listing import resolve

    checkpoint = str(resolve(path))
    return checkpoint if dim is None else f"{checkpoint}?dim={dim}"


def check_spec(spec: str) -> None:
    """Find out what is wrong with a specification as far as that takes no loading.

    Raises:
        UserError: options that do not exist, a run without a complete checkpoint, an export that lacks a file, or a
            folder that is not there. A name that may be one of the hub is left to `load_encoder`.
    """
    path, _ = split_dim(spec)
    if path == "bm25":
        raise UserError(f"model {spec}: it has no embeddings; `lbr eval`, `search` and `mine` take it, as plain bm25")
    if path.startswith("hf:"):
        path = _hf_options(path)[0]
    elif is_run(path):
        from lbr_dist.training.checkpoint.listing import resolve

        resolve(path, kinds=())
        return
    folder = Path(path)
    if is_export(folder) and (problem := damage(folder)):
        raise UserError(damaged_export(spec, problem))
    if problem := _no_model(folder):
        raise UserError(f"model {spec}: not a run, an export or a sentence-transformers model ({problem})")
    plain = (folder / "config.json").is_file() and not (folder / "modules.json").exists()
    if plain and not spec.startswith("hf:"):
        raise UserError(f"model {spec}: a plain model folder has no pooling of its own; say hf:{spec}?pooling=mean")


def _no_model(folder: Path) -> str:
    """Why a path cannot be that of a model; "" where it may be, or is a name of the hub."""
    if folder.is_dir():
        if any((folder / name).is_file() for name in ("modules.json", "config.json", "adapter_config.json")):
            return ""
        begun = (folder / "recipe.yaml").is_file()
        return "a run without a checkpoint" if begun else "a folder without modules.json or config.json"
    if folder.exists():
        return "is a file"
    return "no such folder" if folder.is_absolute() or (len(folder.parts) > 1 and folder.parent.is_dir()) else ""


def split_dim(spec: str) -> tuple[str, int | None]:
    """A specification without its `dim=N`, and N.

    Raises:
        UserError: N is not a positive number.
    """
    found = re.search(r"[?&]dim=([^&]*)$", spec)
    if found is None:
        return spec, None
    if not found[1].isdecimal() or int(found[1]) == 0:
        raise UserError(f"model {spec}: dim={found[1]} is not a number of dimensions")
    return spec[: found.start()], int(found[1])


def model_fingerprint(spec: str) -> str:
    """Hash that changes when the model behind `spec` does.

    Of a checkpoint's manifest, of a folder's files, or of a hub name's commit (see `identity`).
    """
    path, dim = split_dim(spec)
    if is_run(path):
        from lbr_dist.training.checkpoint.chosen import with_checkpoint

        mark = b"" if dim is None else str(dim).encode()
        manifest = with_checkpoint(path, lambda checkpoint: (checkpoint / "manifest.json").read_bytes())
        return xxhash.xxh128_hexdigest(manifest + mark)
    parts = [spec, f"version {HF_VERSION}"] if spec.startswith("hf:") else [spec]
    return xxhash.xxh128_hexdigest("\n".join([*parts, *identity(_place(spec))]).encode())


def check_output(spec: str, out: Path) -> None:
    """See that an output does not lie in a folder of a model that all files there identify.

    Raises:
        UserError: it does: what is written there would make the model another one before the command is repeated.
    """
    if is_run(split_dim(spec)[0]):
        return
    places = [place for origin in origins(_place(spec)) if Path(origin).is_dir() for place in folders(Path(origin))]
    if any(Path(os.path.realpath(out)).is_relative_to(os.path.realpath(place)) for place in places):
        raise UserError(
            f"{out}: lies in the folder of model {spec}, which every file in it identifies: the same command could not "
            "go on after an interruption; choose a place outside it"
        )


def _place(spec: str) -> str:
    """The folder or hub name of a specification that is no run's."""
    return split_dim(spec)[0].removeprefix("hf:").partition("?")[0]


def _check_surprisal_model(checkpoint: Path, path: str) -> None:
    """The model must have the weights that the run was planned by."""
    from lbr_dist.data.information import model_fingerprint
    from lbr_dist.training.checkpoint.format import read_manifest

    found, identity = model_fingerprint(path), read_manifest(checkpoint).state.get("identity", {})
    planned = [value for key, value in identity.items() if key.endswith("bottleneck.surprisal")]
    if not all(found in value for value in planned):
        raise UserError(
            f"surprisal model {path}: is not the one that {checkpoint} was trained by, and would give texts other "
            "numbers of bottleneck tokens: put that one in its place"
        )


def _hf_encoder(spec: str, device: str) -> Encoder:
    from lbr_dist.inference.hf_encoder import PaddedEncoder

    path, pooling, max_tokens = _hf_options(spec)
    return PaddedEncoder(path, pooling, max_tokens, device)


def _hf_options(spec: str) -> tuple[str, Literal["mean", "last"], int]:
    """Path, pooling and longest text of an hf: specification."""
    path, _, query = spec.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query))
    pooling = options.pop("pooling", "mean")
    max_tokens = options.pop("max_tokens", str(HF_MAX_TOKENS))
    if options or pooling not in ("mean", "last") or not max_tokens.isdecimal() or int(max_tokens) == 0:
        raise UserError(f"model {spec}: expected hf:PATH?pooling=mean or pooling=last, and optionally &max_tokens=N")
    return path, "mean" if pooling == "mean" else "last", int(max_tokens)


def _run_name(path: Path, recipe: Recipe) -> str:
    name = recipe.tracking.name or Path(recipe.output).name
    return name if (path / "checkpoints").is_dir() else f"{name}@{path.name}"
