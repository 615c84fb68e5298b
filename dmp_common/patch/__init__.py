"""The method: what a patch is made of, its formula, its losses and its file."""
