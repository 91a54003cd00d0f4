"""Raw files to shards: `lbr prepare` with its blocks on Ray. Under `ray job submit`, or by itself; docs/ray.md.

python ray_jobs/prepare.py SOURCES... --out SET --tokenizer MODEL [--num-workers N]
"""

import sys

from lbr_dist.cli.data import prepare
from lbr_dist.cli.on_ray import main
from lbr_dist.launch.ray_start import keep_to_node_address

if __name__ == "__main__":
    keep_to_node_address()
    sys.exit(main(prepare))
