"""How a run is started and restarted: on one machine, by Ray, by Slurm."""
