"""The A1111 / Forge extension.

`script.py` is what users see in the tabs, `cards.py` and `axes.py` what they see in the extra
networks and in the X/Y/Z plot, `host.py` finds the model and attaches inside `p.sample`. Only these
import the host; `choice.py`, `files.py` and `session.py` know its conventions but not its code.
"""
