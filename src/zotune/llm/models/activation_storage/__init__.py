"""Where activations that are computed once are stored: in memory, in a file of the run, in a folder of several runs."""
