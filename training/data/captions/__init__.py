"""Captions: the files they are in, and what becomes of them in each epoch."""
