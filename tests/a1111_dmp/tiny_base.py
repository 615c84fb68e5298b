"""The bases of the small checkpoints that `checkpoints.py` makes; the server needs them too."""

from __future__ import annotations

from dmp_common import Base, bases, register_base

WIDTH = 32  # channels of the UNet; the real ones have ten times as many
SD = {"widths": (WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH), "attention": (True, True, True, False)}
XL = {"widths": (WIDTH, 2 * WIDTH, 4 * WIDTH), "attention": (False, True, True)}
BASES = {  # `context` is the width of the text encoders together
    "tiny-a1111": SD | {"context": 64},
    "narrow-a1111": SD | {"context": 768},
    "tiny-v-a1111": SD | {"context": 256, "prediction": "v_prediction"},
    "tiny-xl-a1111": XL | {"context": 64 + 256},
    "narrow-xl-a1111": XL | {"context": 2048},
}
FLUX = {  # what differs from the real one in Forge's words; heads are as wide as its
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "context_in_dim": 64,
}
SD3_DEPTH = 2  # A1111 makes 64 channels for each block
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_heads": 2, "num_layers": 2}


def register() -> dict[str, Base]:
    """Makes the bases known."""
    made = {name: register_base(bases.unet(name, **kind)) for name, kind in BASES.items()}
    flux = bases.flux(
        "narrow-flux-a1111",
        double=FLUX["depth"],
        single=FLUX["depth_single_blocks"],
        width=FLUX["hidden_size"],
        hub_id=None,
    )
    sd3 = bases.sd3(
        "narrow-sd3-a1111", depth=SD3_DEPTH, width=64 * SD3_DEPTH, dual=False, hub_id=None
    )
    return made | {base.name: register_base(base) for base in (flux, sd3)}
