"""The figures of the checkpoint benchmark, each a function that can be run alone."""
