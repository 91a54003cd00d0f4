"""Texts to vectors: `lbr encode` with its blocks on a Ray cluster. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/encode.py MODEL TEXTS.jsonl VECTORS.parquet [--num-workers N]
"""

from lbr_dist.cli.models import encode
from lbr_dist.cli.on_ray import main
from lbr_dist.launch.ray_start import run_driver

if __name__ == "__main__":
    run_driver(lambda: main(encode))
