"""The ComfyUI nodes: `nodes.py` (what users see) and `host.py` (how a patch acts in a model).

Only these two import ComfyUI; the other files know its conventions but not its code.
"""
