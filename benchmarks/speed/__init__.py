"""Speed of the loaders, the training step, the command line and whole runs, compared with other programs."""
