"""Stage 1, stage 2, evaluation and export on Ray, as one job. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/pipeline.py STAGE1.yaml STAGE2.yaml [OUT] --num-workers 2:8
"""

import sys

from lbr_dist.launch.ray_pipeline import main
from lbr_dist.launch.ray_start import keep_to_node_address

if __name__ == "__main__":
    keep_to_node_address()
    sys.exit(main())
