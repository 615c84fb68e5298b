"""Everything that has to be seen once on a GPU, in one command and one report."""
