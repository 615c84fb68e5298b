"""Data sets the trainer knows by name."""
