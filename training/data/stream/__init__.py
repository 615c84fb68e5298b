"""Tar shards that are read front to back."""
