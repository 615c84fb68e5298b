"""One training run: built, looped, saved, continued."""
