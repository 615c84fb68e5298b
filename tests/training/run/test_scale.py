"""Two processes make the patch of one; a sharded base trains like a whole one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from dmp_common import Patch
from tests.training.tinybases import make_base, make_pictures
from training.run.scale import accumulation
from training.train_dmp import main

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
Launch = Callable[..., Path]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs the trainer in so many processes of this machine; returns the folder of its output.

    One process is this one, which has imported everything.
    """

    def launch(name: str, processes: int, *options: str, says: str = "") -> Path:
        out = tmp_path / name
        if processes == 1:
            assert main(["--cpu", "--output_dir", str(out), *options]) == 0
            return out
        done = subprocess.run(
            [sys.executable, "-m", "tests.training.ranks", str(processes), "--cpu",
             "--output_dir", str(out), *options],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert says in done.stdout
        return out

    return launch


def relative_distance(a: Patch, b: Patch) -> float:
    """Largest relative distance of two tensors of the same name."""
    return max(
        float((tensor - b.tensors()[name]).norm() / tensor.norm())
        for name, tensor in a.tensors().items()
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows needs a libuv build of torch")
def test_two_processes_equal_one(launch: Launch, digits_base: Path) -> None:
    """With the same global batch; the sums of a batch are rounded in another order."""
    shared = [
        "--base", "tiny-digits", "--pretrained_model_name_or_path", str(digits_base),
        "--dataset_name", "digits", "--max_train_steps", "5", "--importance_weight", "0.1",
        "--load_weight", "0.1", "--lr_scheduler", "constant", "--validate_every_n_steps", "5",
        "--max_validation_images", "32", "--validation_bins", "2", "--save_state",
        "--save_every_n_steps", "3", "--noise_offset", "0.05", "--gate_noise",
        "--objective", "two-sided", "--own_samples", "32", "--own_steps", "2",
    ]  # fmt: skip
    file = "tiny-digits-dmp.safetensors"
    one = Patch.load(launch("one", 1, *shared, "--train_batch_size", "16") / file)
    half = ["--train_batch_size", "8"]
    two = Patch.load(launch("two", 2, *shared, *half) / file)
    assert relative_distance(one, two) < 2e-4
    assert one.metadata["ss_total_batch_size"] == two.metadata["ss_total_batch_size"] == "16"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo on Windows needs a libuv build of torch")
def test_sharded_base_trains_like_a_whole_one(launch: Launch, tmp_path: Path) -> None:
    shared = [
        "--base", "tiny-flux", "--resolution", "16", "--max_train_steps", "3",
        "--pretrained_model_name_or_path", str(make_base(tmp_path / "base", "flux")),
        "--train_data_dir", str(make_pictures(tmp_path / "pictures")), "--lr_scheduler", "constant",
        "--importance_weight", "0.1", "--t5_max_token_length", "6", "--gradient_checkpointing",
    ]  # fmt: skip
    file = "tiny-flux-dmp.safetensors"
    one = Patch.load(launch("one", 1, *shared, "--train_batch_size", "2") / file)
    half = ["--train_batch_size", "1", "--fsdp"]
    two = Patch.load(
        launch("two", 2, *shared, *half, says="4 blocks of the base are shared") / file
    )
    assert relative_distance(one, two) < 5e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {
        "cpu": DistributedType.MULTI_CPU,
        "multi_gpu": DistributedType.MULTI_GPU,
        "multi_node": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "deepspeed": DistributedType.DEEPSPEED,
    }
    assert config.distributed_type == kinds[path.stem]
    if path.stem == "fsdp2":
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["fsdp_config"]["fsdp_version"] == 2


def test_accumulation_fills_the_global_batch() -> None:
    from training.options.config import TrainConfig

    config = TrainConfig(train_batch_size=4, global_batch_size=128, dataset_name="digits")
    assert [accumulation(config, world) for world in (1, 2, 8)] == [32, 16, 4]
