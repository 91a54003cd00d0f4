"""What is known of devices: peaks by the makers' data sheets, and the machines that `lbr plan --gpu` can count with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PEAK_FLOPS = {
    "H200 NVL": 836e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}
"""Dense bfloat16 operations per second of one GPU; the first name in its own counts."""


@dataclass(frozen=True)
class Machine:
    """One device: memory in GiB, peak operations and link bytes per second, and the share of the peak assumed."""

    name: str
    memory_gib: float
    peak_flops: float
    inside: float
    """To the other devices of the node, bytes/s."""
    outside: float
    """To other nodes, bytes/s per device."""
    per_node: int
    share: float
    """Share of the peak that a step reaches while it computes (MFU without communication)."""
    base_gib: float
    """Memory that the process takes before the model: CUDA context and libraries, or the Python process."""
    write: float = 0.0
    """Bytes/s at which a rank's checkpoint is checksummed and forced to disk; where the host is the device."""


MACHINES = {
    "h100": Machine("H100 SXM", 80, PEAK_FLOPS["H100"], 450e9, 50e9, 8, 0.40, 1.5),
    "h200": Machine("H200 SXM", 141, PEAK_FLOPS["H200"], 450e9, 50e9, 8, 0.40, 1.5),
    "a100": Machine("A100 SXM", 80, PEAK_FLOPS["A100"], 300e9, 25e9, 8, 0.45, 1.5),
    "cpu": Machine("CPU core", float("inf"), 60e9, 5e9, 1e9, 64, 0.7, 0.53, 0.1e9),
}
"""Links by data sheet (NVLink one way; 400 or 200 Gbit/s of network per GPU); `cpu` is a rough guess."""


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device, None where it is not known (CPUs among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
