"""The A1111 / Forge extension.

`script.py` has our scripts and `controls.py` what they show in the tabs, `cards.py` the extra
networks tab and the prompt syntax, `axes.py` the axes of the X/Y/Z plot. `tags.py` reads the
prompts of a batch, `listing.py` lists the patches for controls and API, `options.py` has our page
in the settings. `host.py` finds the model and attaches patches inside `p.sample`. Only these import
the host. `choice.py`, `infotext.py`, `failure.py`, `chosen.py`, `conditions.py`, `files.py` and
`session.py` follow its conventions but do not need its code.
"""
