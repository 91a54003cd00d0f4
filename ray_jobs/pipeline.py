"""Stage 1, stage 2, evaluation and export on Ray, as one job. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/pipeline.py STAGE1.yaml STAGE2.yaml [OUT] --num-workers 2:8
"""

from lbr_dist.launch.ray_pipeline import main
from lbr_dist.launch.ray_start import run_driver

if __name__ == "__main__":
    run_driver(main)
