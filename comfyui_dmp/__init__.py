"""The ComfyUI nodes.

`nodes.py` and `stack.py` define the nodes that users see, with the inputs of `inputs.py`; `host.py`
makes a patch act in a model, and `masks.py` brings its mask there. Only these and `files.py` import
ComfyUI. The other files follow its conventions but do not need its code.
"""
