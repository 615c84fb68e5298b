"""ComfyUI loads this file when the repository is cloned into `custom_nodes`.

The node pack is not here yet (README.md, "What works today"), so there is nothing to register.
The file must stay importable without ComfyUI: test runners load it too.
"""
