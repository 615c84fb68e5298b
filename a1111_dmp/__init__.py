"""The A1111 / Forge extension: a placeholder, not here yet (README.md, "What works today")."""
