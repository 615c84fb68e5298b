"""A1111 and Forge load this file when the repository is cloned into `extensions`.

They have the repository's root on `sys.path` while they load it, and take it off afterwards; so
everything is imported here. "Reload UI" loads this file again: so that it is of one piece with an
update, what was imported of this repository before is forgotten first.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for name in [n for n in sys.modules if n.split(".")[0] in ("dmp_common", "a1111_dmp")]:
    if ROOT in Path(getattr(sys.modules[name], "__file__", None) or "").resolve().parents:
        del sys.modules[name]

from a1111_dmp import script  # noqa: E402

Accordion, DropDown = script.Accordion, script.DropDown  # the host takes each class it finds here
script.register()
