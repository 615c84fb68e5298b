"""The ComfyUI nodes.

`nodes.py`, `stack.py`, `promptlist.py`, `trainnode.py` and `saving.py` define the nodes that users
see, with the inputs of `inputs.py`. `host.py` makes a patch act in a model, and `masks.py` brings
its mask there; `heatmaps.py` asks a model what a gate sees. `pictures.py` and `places.py` talk to
ComfyUI's server and its page. `train.py` trains a patch: `teacher.py` asks the exact model,
`student.py` trains on the cheap one. The files that do not need ComfyUI's code follow its
conventions.
"""
