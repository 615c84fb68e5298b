"""The ComfyUI nodes: `nodes.py` (what users see) and `host.py` (how a patch acts in a model).

Only these two import ComfyUI; `record.py` and `slots.py` know its conventions but not its code.
"""
