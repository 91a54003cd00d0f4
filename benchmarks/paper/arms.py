"""The arms of the experiments: what each is trained on, where it starts, and what it changes in its stage's recipe.

All arms of a stage share data, steps, batch and schedule; an arm says only what makes it that arm. Baselines pool by
the mean over tokens, which was better for them than the last token wherever both were measured (`pooling` measures it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PLAIN = ("bottleneck.enabled=false", "contrastive.pooling=mean")
LAST = ("bottleneck.enabled=false", "contrastive.pooling=last")
STRATA = ("data.sets=[{path: data/strata}]",)
TEXT = ("data.sets=[{path: data/text_apart}]",)
HALVES = ("data.sets=[{path: data/halves}]",)
BOTH = ("data.sets=[{path: data/domain}, {path: data/swapped}]",)
NEXT_TOKEN = ("generative.target=prefix", "generative.prefix_min=0", "generative.prefix_max=0")
RATIOS = (10, 20, 100, 200, 500, 1000)
LONG_RATIOS = (10, 50, 200)
SHARES = (0, 20, 40, 60, 80, 100)
PASSES = 2
"""How often figure 3 goes over its budget of samples."""


@dataclass(frozen=True)
class Arm:
    """One trained model."""

    title: str
    stage: Literal["generative", "contrastive", "joint"]
    start: str | None = "base"
    """The arm whose weights it starts from; None: the backbone as it is."""
    settings: tuple[str, ...] = ()
    rate: str = ""
    """Arm whose searched learning rate it uses; default: its own."""
    adaptive: Literal["", "length", "surprisal"] = ""
    """What the number of bottleneck tokens goes by; default: it is fixed."""


ARMS: dict[str, Arm] = {
    "gl": Arm("LLM + GL", "generative", settings=PLAIN),
    "ib_gl": Arm("LLM + IB-GL", "generative"),
    "cl": Arm("LLM + CL", "contrastive", settings=PLAIN),
    "cl_last": Arm("LLM + CL, last token", "contrastive", settings=LAST, rate="cl"),
    "cl_bottleneck": Arm("LLM + CL, bottleneck", "contrastive", rate="cl"),
    "gl_cl": Arm("LLM + GL + CL", "contrastive", "gl", PLAIN),
    "gl_cl_last": Arm("LLM + GL + CL, last token", "contrastive", "gl", LAST, "gl_cl"),
    "lbr": Arm("LLM + IB-GL + CL (LBR)", "contrastive", "ib_gl"),
    "lbr_bidirectional": Arm(
        "LLM + IB-GL + bidirectional CL", "contrastive", "ib_gl", ("contrastive.attention=bidirectional",), "lbr"
    ),
    "pt": Arm("PT", "generative", settings=(*PLAIN, *TEXT, *NEXT_TOKEN), rate="gl"),
    "ib_gl_reconstruct": Arm(
        "IB-GL (PT, reconstruction)", "generative", settings=(*TEXT, "generative.target=reconstruct"), rate="ib_gl"
    ),
    "ib_gl_prefix": Arm("IB-GL (PT, prefix)", "generative", settings=(*TEXT, "generative.target=prefix"), rate="ib_gl"),
    "pt_cl": Arm("PT + CL", "contrastive", "pt", PLAIN, "gl_cl"),
    "ib_gl_reconstruct_cl": Arm("IB-GL (PT, reconstruction) + CL", "contrastive", "ib_gl_reconstruct", rate="lbr"),
    "ib_gl_prefix_cl": Arm("IB-GL (PT, prefix) + CL", "contrastive", "ib_gl_prefix", rate="lbr"),
    "gl_both": Arm("GL, both ways", "generative", settings=(*PLAIN, *BOTH), rate="gl"),
    "ib_gl_both": Arm("IB-GL, both ways", "generative", settings=BOTH, rate="ib_gl"),
    "gl_both_cl": Arm("GL, both ways + CL", "contrastive", "gl_both", PLAIN, "gl_cl"),
    "lbr_both": Arm("IB-GL, both ways + CL", "contrastive", "ib_gl_both", rate="lbr"),
    "ib_gl_three": Arm("IB-GL, 3 Z", "generative", settings=("bottleneck.tokens=3",), rate="ib_gl"),
    "ib_gl_length": Arm("IB-GL, Z by length", "generative", rate="ib_gl", adaptive="length"),
    "ib_gl_surprisal": Arm("IB-GL, Z by surprisal", "generative", rate="ib_gl", adaptive="surprisal"),
    "lbr_three": Arm("IB-GL + CL, 3 Z", "contrastive", "ib_gl_three", ("bottleneck.tokens=3",), "lbr"),
    "lbr_length": Arm("IB-GL + CL, Z by length", "contrastive", "ib_gl_length", rate="lbr", adaptive="length"),
    "lbr_surprisal": Arm(
        "IB-GL + CL, Z by surprisal", "contrastive", "ib_gl_surprisal", rate="lbr", adaptive="surprisal"
    ),
    "joint": Arm("one stage, both losses, w = 0.5", "joint"),
    "joint_moving": Arm(
        "one stage, both losses, w from 0.1 to 0.9",
        "joint",
        settings=("joint.weight=0.1", "joint.final_weight=0.9", "joint.schedule=linear"),
        rate="joint",
    ),
}
for _ratio in RATIOS:
    ARMS[f"ratio_{_ratio}"] = Arm(
        f"R = {_ratio}",
        "generative",
        settings=("bottleneck.tokens=null", f"bottleneck.ratio={_ratio}", f"bottleneck.max_tokens={-(-256 // _ratio)}"),
        rate="ib_gl",
    )
for _ratio in LONG_RATIOS:
    _long = (
        "bottleneck.tokens=null", f"bottleneck.ratio={_ratio}", f"bottleneck.max_tokens={-(-368 // _ratio)}",
        "data.max_x_tokens=368", "data.max_y_tokens=96",
    )  # fmt: skip
    ARMS[f"long_{_ratio}"] = Arm(f"R = {_ratio}, IB-GL", "generative", settings=(*_long, *STRATA), rate="ib_gl")
    ARMS[f"long_{_ratio}_cl"] = Arm(f"R = {_ratio}, IB-GL + CL", "contrastive", f"long_{_ratio}", _long, "lbr")
for _share in SHARES:
    for _name, _kind, _settings, _rates in (
        ("gl", "GL", PLAIN, ("gl", "gl_cl")),
        ("ib", "IB-GL", (), ("ib_gl", "lbr")),
    ):
        _stage_1 = f"share_{_name}_{_share}_learn"
        if _share:
            ARMS[_stage_1] = Arm(
                f"{_kind}, {_share}% of the samples",
                "generative",
                settings=(*_settings, *HALVES, "duration.steps=null", f"duration.epochs={PASSES * _share / 100}"),
                rate=_rates[0],
            )
        if _share < 100:
            ARMS[f"share_{_name}_{_share}"] = Arm(
                f"{_kind} {_share}% + CL {100 - _share}%",
                "contrastive",
                _stage_1 if _share else "base",
                (*_settings, *HALVES, "duration.steps=null", f"duration.epochs={PASSES * (100 - _share) / 100}"),
                _rates[1],
            )


def rate_name(name: str) -> str:
    """The arm whose learning rate `name` uses."""
    return ARMS[name].rate or name
