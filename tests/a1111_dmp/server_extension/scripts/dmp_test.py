"""An extension for tests of a real server: link its folder into `extensions`, after ours.

It makes the tiny base known, logs each call of the model, can let one fail, offers a replaced UNet
and answers what only the inside of the server knows.
"""

import gc
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path

import torch
from fastapi import Body, FastAPI
from modules import script_callbacks, sd_unet, shared

from dmp_common.bases.base import find_module
from dmp_common.bases.detect import detect_base, find_denoiser

FOLDER = Path(__file__).resolve().parents[2]
calls: list[dict[str, object]] = []
failure: list[str] = []
told: list[str] = []


class Kept(logging.Handler):
    """Keeps what the extension tells on the console."""

    def emit(self, record: logging.LogRecord) -> None:
        told.append(record.getMessage())


def load_base():
    spec = importlib.util.spec_from_file_location("dmp_tiny_base", FOLDER / "tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return module


def know_narrow(sizes) -> None:
    """Lets Forge and its siblings take a model with a UNet a tenth as wide for SD 1.5 or SDXL.

    They build text encoder and decoder by the book, so that only the UNet can be smaller.
    """
    if "backend" in sys.modules:  # Forge Neo imports these when it loads its first model
        for name in ("huggingface_guess.model_list", "backend.loader"):
            importlib.import_module(name)
    for name in ("huggingface_guess.model_list", "ldm_patched.modules.supported_models"):
        if name in sys.modules:
            for kind in ("SD15", "SDXL"):
                getattr(sys.modules[name], kind).unet_config["model_channels"] = sizes.WIDTH
    if "backend.loader" in sys.modules:
        know_narrow_flux(sizes, sys.modules["huggingface_guess"], sys.modules["backend.loader"])


def know_narrow_flux(sizes, guesses, loader) -> None:
    """Lets Forge build Flux and its T5 with other numbers; it reads none off the checkpoint."""
    guess, read = guesses.guess, loader.read_arbitrary_config

    def narrow_guess(state):
        found = guess(state)
        if isinstance(found, guesses.model_list.Flux):
            found.unet_config |= sizes.FLUX
        return found

    guesses.guess = narrow_guess
    loader.read_arbitrary_config = lambda folder: read(folder) | sizes.T5


class Replaced(getattr(sd_unet, "SdUnet", torch.nn.Module)):  # Forge Neo has none
    """Stands for an engine: calculates something, without the model's modules."""

    def forward(self, x, timesteps, context, *args, **kwargs):
        return x * 0.9

    def activate(self):
        """Does nothing; every host calls it, and the base class has it where there is one."""

    def deactivate(self):
        """Does nothing, like `activate`."""


class Option(sd_unet.SdUnetOption):
    model_name, label = "no such checkpoint", "Simulated engine"

    def create_unet(self):
        return Replaced()


def denoiser():
    return find_denoiser(shared.sd_model)


def time_module():
    """What a patch always has a hook on."""
    model = denoiser()
    return find_module(model, detect_base(model).times["ldm"].path)


def hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def log(params) -> None:
    info = shared.sd_model.sd_checkpoint_info
    calls.append(
        {
            "size": list(params.x.shape),
            "sigma": float(params.sigma[0]),
            "checkpoint": Path(info.filename).stem,
            "attached": len(time_module()._forward_hooks),
        }
    )
    if failure:
        handle = denoiser().register_forward_pre_hook(lambda *a: fail(handle, failure.pop()))


def fail(handle, text: str) -> None:
    handle.remove()
    raise RuntimeError(text)


def state() -> dict[str, object]:
    gc.collect()
    model = denoiser()
    weights = sum(float(p.sum()) for p in model.parameters())
    kinds = [type(thing).__name__ for thing in gc.get_objects()]
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return {
        "hooks": hooks(model),
        "weights": weights,
        "rss": int(pages) * os.sysconf("SC_PAGE_SIZE"),
        "calls": list(calls),
        "told": list(told),
        "path": [p for p in sys.path if (Path(p) / "dmp_common").is_dir()],
        "torch": torch.__version__,
        "attachments": kinds.count("Attachment"),
        "sessions": kinds.count("Session"),
    }


def routes(_, app: FastAPI) -> None:
    @app.get("/dmp-test/state")
    def get_state():
        return state()

    @app.post("/dmp-test/clear")
    def clear():
        calls.clear()
        told.clear()
        failure.clear()
        return {}

    @app.post("/dmp-test/fail")
    def fail_next(text: str = Body(embed=True)):
        failure[:] = [text]
        return {}

    @app.post("/dmp-test/reload")
    def reload():
        shared.state.request_restart()
        return {}

    @app.post("/dmp-test/paste")
    def paste(text: str = Body(embed=True)):
        """What "read parameters" would put into the controls of the scripts of txt2img."""
        from modules import infotext_utils, scripts

        params = infotext_utils.parse_generation_parameters(text)
        script_callbacks.infotext_pasted_callback(text, params)
        found = {}
        for field in infotext_utils.paste_fields["txt2img"]["fields"]:
            for script in scripts.scripts_txt2img.scripts:
                if script.controls and field[0] in script.controls and "dmp" in script.name:
                    value = field[1](params) if callable(field[1]) else params.get(field[1])
                    found[f"{script.name}/{field[0].label}"] = value
        return {"fields": found, "prompt": params.get("Prompt")}


bases = load_base()
if os.environ.get("DMP_TEST_NARROW"):
    know_narrow(bases)
logging.getLogger("a1111_dmp.host").handlers[:] = [Kept()]
script_callbacks.on_cfg_denoiser(log)
script_callbacks.on_list_unets(lambda options: options.append(Option()))
script_callbacks.on_app_started(routes)
