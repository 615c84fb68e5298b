"""Latents and text outputs that are computed once and kept, in memory or in files."""
