"""Noising, losses, weights of timesteps, and sampling: one of each."""
