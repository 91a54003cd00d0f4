"""Stage 1 on Ray, generative learning through the bottleneck. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/stage1.py RECIPE [key=value ...] --num-workers 2:8
"""

import sys

from lbr_dist.launch.ray_stage import main
from lbr_dist.launch.ray_start import keep_to_node_address

if __name__ == "__main__":
    keep_to_node_address()
    sys.exit(main("generative"))
