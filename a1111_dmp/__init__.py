"""The A1111 / Forge extension. A placeholder: it is not here yet (README.md, "What works today")."""
