"""How a run starts: the command line, ranks on one machine, Slurm, Open MPI, and what the machine can do."""
