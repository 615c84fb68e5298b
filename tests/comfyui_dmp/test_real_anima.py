"""Anima's captions: the trainer and ComfyUI's own class, with the conditioner inside of it."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from dmp_common import attach
from tests.training.tinybases import WORDS, word_tokenizer
from tests.training.tinylanguage import qwen3

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore")]
SIZE: dict[str, Any] = {"source_dim": 12, "target_dim": 16, "model_dim": 16, "num_layers": 2}
WEIGHTS, CAPTION = 0.5, "a red cat"


def test_the_trainer_predicts_what_comfyui_does(real, run, host):
    """From the states of Qwen3 and the tokens of T5 to the prediction of a patched model."""
    family = real.FAMILIES.get("anima") or pytest.skip("needs a ComfyUI that knows it")
    import diffusers
    from comfy.ldm.anima.model import LLMAdapter

    from training.base.families.table import ANIMA
    from training.options.command_line import resolve

    words = len(WORDS) + 3
    conditioner = diffusers.AnimaTextConditioner(
        **SIZE, num_attention_heads=2, target_vocab_size=words
    )
    parts = {
        "text_encoder": qwen3(words),
        "tokenizer": word_tokenizer(512),
        "t5_tokenizer": word_tokenizer(512),
        "text_conditioner": real.randomised(conditioner),
    }

    @contextlib.contextmanager
    def building():
        adapter = partial(LLMAdapter, **SIZE, num_heads=2)
        with mock.patch("comfy.ldm.anima.model.LLMAdapter", adapter):
            yield

    patcher = dataclasses.replace(family, building=building).comfy()
    adapter = patcher.model.diffusion_model.llm_adapter
    adapter.embed = torch.nn.Embedding(words, 16)
    adapter.load_state_dict(conditioner.state_dict())
    adapter.embed.forward = lambda ids, out_dtype: torch.nn.functional.embedding(
        ids, adapter.embed.weight
    )
    patch = family.patch(sites="all", std=0.2)
    patcher, twin = host.attach(patcher, run.record(patch)), family.diffusers()
    with torch.no_grad():
        told = ANIMA.encode_text(parts, [CAPTION], resolve({"base": "anima"}))
        ids = word_tokenizer(512)(CAPTION, return_tensors="pt").input_ids
        states = parts["text_encoder"](ids).last_hidden_state
        sigma, x = torch.tensor([0.6]), real.noise(4, 1, 16, 1, 8, 12)
        weights = torch.ones(1, ids.shape[1], 1)
        with attach(twin, patch):
            ours = ANIMA.predict(twin, x.squeeze(2), 1000 * sigma, told)
            plain = ANIMA.predict(family.diffusers(), x.squeeze(2), 1000 * sigma, told)
    assert told["prompt"].shape == (1, 512, 16)
    theirs = run.call_with(patcher, x, sigma, states, t5xxl_ids=ids, t5xxl_weights=weights)
    theirs = ((x - theirs) / sigma).squeeze(2)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (ours - plain).abs().max() > 0.01 * plain.abs().max()
