"""What the command line says of a model that is compared."""

from __future__ import annotations

from dataclasses import dataclass

from dmp_common import PatchError

KINDS = ("dmp", "prompt", "lora", "full", "joint")
BASE = "base"  # the label of the base itself


@dataclass(frozen=True)
class Spec:
    """One --model LABEL=KIND:PATH.

    Args:
        label: name in the report; the same label several times means several seeds.
        kind: one of `KINDS`.
        path: of a file, or of a folder for full and joint.
    """

    label: str
    kind: str
    path: str

    @staticmethod
    def parse(text: str) -> Spec:
        """Reads a value of --model.

        Raises:
            PatchError: it is not LABEL=KIND:PATH.
        """
        label, equals, rest = text.partition("=")
        kind, colon, path = rest.partition(":")
        if not (label.strip() and equals and colon and path) or kind not in KINDS:
            raise PatchError(
                f"expected --model LABEL=KIND:PATH with KIND {', '.join(KINDS)}, found {text!r}: "
                "for example --model DMP=dmp:output/digits/digits-dmp.safetensors."
            )
        if label.strip() == BASE:
            raise PatchError(f"expected another label than {BASE}, found {text!r}: rename it.")
        return Spec(label.strip(), kind, path)
