"""Hard negatives: `lbr mine` with its blocks on a Ray cluster. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/mine.py MODEL SET --out MINED [--num-workers N]
"""

from lbr_dist.cli.data import mine
from lbr_dist.cli.on_ray import main
from lbr_dist.launch.ray_start import run_driver

if __name__ == "__main__":
    run_driver(lambda: main(mine))
