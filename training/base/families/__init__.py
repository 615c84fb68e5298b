"""How the trainer talks to each family of bases; `table.py` says which base is of which."""
