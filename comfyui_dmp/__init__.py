"""The ComfyUI nodes.

`nodes.py` defines the nodes that users see, `host.py` makes a patch act in a model. Only these two
import ComfyUI. The other files follow its conventions but do not need its code.
"""
