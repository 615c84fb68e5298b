"""The methods by the name that --method gives them."""

from __future__ import annotations

from collections.abc import Callable

from training.base.frozen import FrozenBase
from training.methods.full import FullMethod, JointMethod
from training.methods.lora import LoraMethod
from training.methods.method import Method
from training.methods.patch import PatchMethod
from training.options.config import TrainConfig

METHODS: dict[str, Callable[[FrozenBase, TrainConfig], Method]] = {
    "dmp": PatchMethod,
    "prompt": PatchMethod,
    "lora": LoraMethod,
    "full": FullMethod,
    "joint": JointMethod,
}
