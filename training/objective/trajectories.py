"""States that a model passes through while it draws pictures, with the exact predictions there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dmp_common.patch.objectives import guided
from training.base.encoders import FrozenEncoders
from training.base.families.family import Given
from training.base.frozen import FrozenBase
from training.base.schedulers import token_count, token_side
from training.data.batch import Batch
from training.data.draws import below, generator
from training.objective.aim import Aim
from training.objective.inputs import conditions
from training.objective.noise import Names
from training.objective.sampling import denoise, make_sampler
from training.objective.teacher import Teacher, without
from training.options.config import TrainConfig


class Trajectories:
    """Draws pictures from captions or classes alone, and keeps what lies on the way.

    Args:
        frozen: the base that draws: the exact one, or the cheap one without a patch.
        teacher: the exact call, which is asked at every state.
        encoders: of the base.
        config: sampler, steps and guidance of the drawing.
        device: of the models.
        dtype: in which the states will be kept.
    """

    def __init__(
        self,
        frozen: FrozenBase,
        teacher: Teacher,
        encoders: FrozenEncoders,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.frozen, self.teacher, self.encoders = frozen, teacher, encoders
        self.config, self.device, self.dtype = config, device, dtype
        # The exact base walks where its own prediction leads, guidance included.
        self._walks_exactly = frozen.model is teacher.exact.model

    def aims(self, batch: Batch, names: Names) -> Iterator[Aim]:
        """The states of one picture for each sample, an aim for each step of the sampler.

        Args:
            batch: captions or labels; the pictures in it do not matter.
            names: what the random draws of each sample depend on.
        """
        passed: list[Aim] = []
        self.pictures(batch, names, passed)
        low, high = self.config.min_timestep, self.config.max_timestep
        for aim in passed:
            # One timestep for all; 1000 belongs to what reaches to the end.
            if low <= float(aim.t[0]) < high or (high == 1000 and float(aim.t[0]) == high):
                yield aim

    @torch.no_grad()
    def pictures(self, batch: Batch, names: Names, passed: list[Aim] | None = None) -> Tensor:
        """What is drawn (B, C, h, w), in the model's space; of videos (B, C, T, h, w).

        Args:
            batch, names: see `aims`.
            passed: gets the states on the way.
        """
        config, frozen, teacher = self.config, self.frozen, self.teacher
        batch = batch.to(self.device)
        given = conditions(batch, self.encoders, config)
        height, width = map(int, batch.sizes[0, 4:6])
        shape = frozen.latent_shape(height, width)
        sources = [generator(*name, "trajectory") for name in names]
        noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
        scales = teacher.scales(names)
        strengths = teacher.strengths(scales, self.device)

        def predict(x: Tensor, step: Tensor, given: Given) -> Tensor:
            x = x.to(self.dtype).float()
            t = step.to(x.device).expand(len(x))
            target = teacher(x, t, given, scales)
            if passed is not None:
                passed.append(Aim(x, t, given, target, batch.keys, strengths=strengths))
            return self._walked(x, t, given, target)

        steps = config.state_steps + below(config.state_steps + 1, *names[0], "steps")
        tokens = token_count(shape[1:], token_side(frozen.base))
        sampler = make_sampler(frozen.scheduler, steps, tokens, config.state_sampler, frozen.family)
        drawn = denoise(predict, sampler, noise.to(self.device), given, None, 1.0)
        return frozen.family.whole(drawn, given)

    def _walked(self, x: Tensor, t: Tensor, given: Given, target: Tensor) -> Tensor:
        """The prediction that the sampler follows from a state on."""
        told = target if self._walks_exactly else self._cheap(x, t, given)
        scale, nothing = self.config.state_guidance_scale, self.teacher.nothing
        if scale == 1 or nothing is None or self.teacher.range is not None:
            return told
        untold = without(given, nothing)
        other = self.teacher(x, t, untold) if self._walks_exactly else self._cheap(x, t, untold)
        return guided(told, other, scale)

    def _cheap(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        frozen = self.frozen
        output = frozen.family.predict(frozen.model, x.to(frozen.dtype), t, given)
        return output[:, : x.shape[1]].float()
