"""What the speed benchmarks share: the machine's name, clocks, sides that take turns, random models, and tables.

Two sides of a comparison run in one process and take turns, and a ratio is the median of the rounds' own ratios: a
machine that slows down for a while then troubles both sides alike. On a CPU, time is CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lbr_dist import config
from lbr_dist.model import attention
from lbr_dist.model.backbone import DTYPES, equip
from lbr_dist.model.bottleneck import LbrModel, initial_vectors

RESULTS = Path(__file__).parent / "results"

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
    "cpu": {
        **{"vocab_size": 8192, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "135m": {
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "1.5b": {
        **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    },
}
"""Random models: `cpu` has two layers of SmolLM2-135M and a smaller vocabulary, `135m` is SmolLM2-135M (Llama),
`1.5b` is Qwen2.5-1.5B."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes, only to show that it runs: says so in its output"
    )


def head(command: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Where, when and with what a result came about."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} thread"
    found = {"command": command, "hardware": hardware, "date": date.today().isoformat(), "torch": torch.__version__}
    return {**found, **more}


def title(name: str, about: Mapping[str, Any]) -> list[str]:
    """The first lines of a Markdown result."""
    lines = [f"# {name}", "", f"    {about['command']}", ""]
    lines += [f"{about['hardware']}, torch {about['torch']}, {about['date']}.", ""]
    return lines + (["**Toy sizes: these figures mean nothing.**", ""] if about.get("toy") else [])


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown table; `columns`: key of a row to heading. A missing or None value gives an empty cell."""
    lines = ["| " + " | ".join(columns.values()) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in rows:
        lines.append("| " + " | ".join("" if row.get(key) is None else str(row[key]) for key in columns) + " |")
    return lines


def save(folder: Path, name: str, about: Mapping[str, Any], rows: Any, lines: Sequence[str]) -> None:
    """Print the Markdown and write it beside its JSON."""
    text = "\n".join(lines).rstrip() + "\n"
    print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clock(device: str) -> float:
    """Seconds: of this process's CPU time, or on CUDA of the wall with the device idle."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def memory_level(device: str) -> float:
    """MiB in use now; `memory_peak` then gives the highest since. On a CPU the process's resident memory (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present level
    return _status("VmRSS")


def memory_peak(device: str) -> float:
    """Highest MiB since `memory_level`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each side in each round; one more round before them warms up."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, run in sides.items():
            begin = clock(device)
            run()
            if turn:
                seconds[side].append(clock(device) - begin)
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def random_model(
    shape: str, *, attention_setting: str = "auto", dtype: str = "float32", device: str = "cpu", z: int = 8, **more: Any
) -> LbrModel:
    """The model that trains, with random weights: a `Qwen2` for 1.5b, else a `Llama`.

    Args:
        shape: a key of `SHAPES`.
        attention_setting: `model.attention` of a recipe.
        dtype: of the weights.
        device: where.
        z: bottleneck vectors.
        more: further settings of a recipe's `model` section.
    """
    import transformers

    attention.register()
    family = "Qwen2" if shape == "1.5b" else "Llama"
    settings = getattr(transformers, f"{family}Config")(**SHAPES[shape], max_position_embeddings=32768)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with torch.device(device):
            plain = getattr(transformers, f"{family}ForCausalLM")._from_config(
                settings, attn_implementation=attention.NAME
            )
    finally:
        torch.set_default_dtype(before)
    backbone = equip(plain, config.Model(path=shape, **more), seed=0)
    weight: Any = backbone.get_input_embeddings().weight
    z_KD = initial_vectors(weight, z, 0) if z else None
    return LbrModel(backbone, z_KD, attention_setting).train()
