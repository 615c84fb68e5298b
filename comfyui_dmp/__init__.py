"""The ComfyUI nodes. A placeholder: the pack is not here yet (README.md, "What works today")."""
