"""Stage 2 on Ray, contrastive learning on the bottleneck; joint too. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/stage2.py RECIPE [key=value ...] --num-workers 2:8
"""

from lbr_dist.launch.ray_stage import main
from lbr_dist.launch.ray_start import run_driver

if __name__ == "__main__":
    run_driver(lambda: main("contrastive"))
