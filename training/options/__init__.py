"""The configuration of a run: its options, its presets, and the command line."""
