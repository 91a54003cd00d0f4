"""Which arms make which table or figure of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper.arms import ARMS, LONG_RATIOS, RATIOS, SHARES

STAGES = ("base", "gl", "ib_gl", "cl", "gl_cl", "lbr")

PEERS = {
    "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised": "LLM2Vec (Sheared-LLaMA 1.3B)",
    "thenlper/gte-base": "GTE base",
    "BAAI/bge-base-en-v1.5": "BGE base",
    "hf:FacebookAI/xlm-roberta-large?pooling=mean": "XLM-R large",
    "Qwen/Qwen3-Embedding-0.6B": "Qwen3-Embedding 0.6B",
    "hf:AI4Chem/ChemLLM-7B-Chat-1_5-DPO?pooling=mean": "ChemLLM 7B",
    "hf:FreedomIntelligence/HuatuoGPT-7B?pooling=mean": "HuaTuo 7B",
}
"""Models by their hub name; evaluated where the local cache has them."""


@dataclass(frozen=True)
class Experiment:
    """One table or figure."""

    title: str
    arms: tuple[str, ...]
    bm25: bool = True
    peers: bool = False
    generate: bool = False
    costs: bool = False
    """Show what training took."""


EXPERIMENTS = {
    "table1": Experiment("Table 1: against baselines", ("base", "gl", "cl", "gl_cl", "lbr"), peers=True),
    "table2": Experiment(
        "Table 2: retrieval and generation", ("base", "gl", "cl", "ib_gl", "gl_cl", "lbr"), bm25=False, generate=True
    ),
    "table3": Experiment("Table 3: stage by stage", STAGES),
    "table4": Experiment("Table 4: causal or bidirectional CL after IB-GL", ("lbr", "lbr_bidirectional"), bm25=False),
    "table5": Experiment("Table 5: compression ratio, stage 1 only", tuple(f"ratio_{r}" for r in RATIOS), bm25=False),
    "table5-long": Experiment(
        "Table 5 with long inputs, stratified by length: from answer to question, stage 1 and both",
        tuple(f"long_{r}{then}" for then in ("", "_cl") for r in LONG_RATIOS),
        bm25=False,
    ),
    "table6": Experiment(
        "Table 6: SFT or PT",
        (
            "gl", "ib_gl", "pt", "ib_gl_reconstruct", "ib_gl_prefix",
            "gl_cl", "lbr", "pt_cl", "ib_gl_reconstruct_cl", "ib_gl_prefix_cl",
        ),
        bm25=False,
        costs=True,
    ),
    "pooling": Experiment(
        "What pools the baselines",
        ("cl", "cl_last", "cl_bottleneck", "gl_cl", "gl_cl_last", "lbr"),
        bm25=False,
    ),
    "bottleneck": Experiment(
        "The bottleneck with and without stage 1", ("cl", "cl_bottleneck", "lbr"), bm25=False
    ),
    "directions": Experiment(
        "Beyond the paper: stage 1 from question to answer, or both ways",
        ("gl", "ib_gl", "gl_both", "ib_gl_both", "gl_cl", "lbr", "gl_both_cl", "lbr_both"),
        bm25=False,
    ),
    "adaptive": Experiment(
        "Beyond the paper: fixed or adaptive bottleneck",
        ("lbr", "lbr_three", "lbr_length", "lbr_surprisal"),
        bm25=False,
    ),
    "joint": Experiment(
        "Beyond the paper: one joint stage or two", ("cl", "lbr", "joint", "joint_moving"), bm25=False, costs=True
    ),
    "figure3": Experiment(
        "Figure 3: share of the samples that goes into GL",
        tuple(
            name
            for kind in ("gl", "ib")
            for share in SHARES
            if (name := f"share_{kind}_{share}" if share < 100 else f"share_{kind}_100_learn") in ARMS
        ),
        bm25=False,
    ),
}  # fmt: skip
