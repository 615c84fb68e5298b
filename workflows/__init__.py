"""The example workflows for ComfyUI, and what makes them; `make.py` writes the files."""
