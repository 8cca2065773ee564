"""Slurm: the job that a run is in, and sweeps whose jobs are Slurm's."""
