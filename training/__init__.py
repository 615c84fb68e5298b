"""Training patches, and judging them. `python training/train_dmp.py --help` starts here."""
