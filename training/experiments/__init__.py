"""Experiments on the trainer: the digits base, the miniatures, the paper's tables."""
