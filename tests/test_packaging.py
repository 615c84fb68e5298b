"""What the wheel and the source distribution hold, and where versions are written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

import dmp_common

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|\w+\.egg-info/.*|(.*/)?__pycache__/.*")
# setuptools changes sys.argv.
BUILD = (
    "import sys, setuptools.build_meta as build; out = sys.argv[1]; "
    "build.build_sdist(out); build.build_wheel(out)"
)


def own_files() -> list[str]:
    """The files of the project: in a clone those that git knows or would add.

    A source distribution brings its own list.
    """
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        names = listed.decode().strip("\0").split("\0")
    elif lists := sorted(ROOT.glob("*.egg-info/SOURCES.txt")):
        names = lists[0].read_text(encoding="utf-8").split("\n")
    else:
        pytest.skip("needs a clone or a source distribution, which have a list of files")
    return sorted(n for n in names if not GENERATED.fullmatch(n) and (ROOT / n).is_file())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, built from a copy of the project."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in own_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel."""
    return next(built.glob("*.whl"))


def metadata(wheel: Path) -> Message:
    """The metadata of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        name = next(n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(file.read(name))


def test_source_distribution_holds_everything(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        names = [m.name.partition("/")[2] for m in file.getmembers() if m.isfile()]
    assert sorted(n for n in names if not GENERATED.fullmatch(n)) == own_files()


def test_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    library = {n for n in own_files() if n.startswith("dmp_common/")}
    assert {n for n in names if ".dist-info/" not in n} == library
    assert "dmp_common/py.typed" in library


def test_metadata_of_the_wheel(wheel: Path) -> None:
    told = metadata(wheel)
    assert told["Name"] == "diffusion-model-patching"
    assert told["Version"] == dmp_common.__version__
    assert told["Summary"].startswith("Library ")
    assert told["Author"] == "DMP contributors"
    assert told["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in told.get_all("Classifier")
    floor = re.escape(told["Requires-Python"].removeprefix(">="))
    assert re.search(rf":: {floor}\n", "\n".join(told.get_all("Classifier")))


def test_wheel_works_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import dmp_common; from dmp_common.__main__ import main; "
        "assert dmp_common.__file__.startswith(sys.argv[1]), dmp_common.__file__; "
        "dmp_common.Patch.create('sd15').save('p.safetensors'); "
        "sys.exit(main(['validate', 'p.safetensors']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", str(wheel)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK ")


def test_version_stands_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == dmp_common.__version__
    assert cited["license"] == PROJECT["project"]["license"]
    assert "2405.17825" in str(cited["preferred-citation"])


def workflow(name: str) -> dict[str, dict[str, object]]:
    """The jobs of a workflow."""
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    jobs: dict[str, dict[str, object]] = yaml.safe_load(text)["jobs"]
    return jobs


def test_lowest_versions_stand_in_the_project_file_alone() -> None:
    """A second list of them would soon be another one."""
    jobs = workflow("ci.yml")
    assert not re.search(r"[\w\]]\s*(==|<=|<|~=)\s*\d", str(jobs))
    parts = jobs["lowest"]["strategy"]["matrix"]["include"]  # type: ignore[index]
    known = PROJECT["project"]["optional-dependencies"]
    assert {part["part"] for part in parts} == {"core", "trainer"}
    for part in parts:
        assert set(part["extras"].split(",")) <= set(known)
        assert all((ROOT / folder).is_dir() for folder in part["tests"].split())
    assert "--resolution lowest-direct" in str(jobs["lowest"]["steps"])


def test_every_requirement_has_a_floor() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        if not line.startswith("diffusion-model-patching["):
            assert re.fullmatch(r"[\w-]+>=[\d.]+(; .+)?", line), line


def test_pack_is_published_only_with_a_publisher() -> None:
    jobs = workflow("publish.yml")
    assert "needs.publisher.outputs.id != ''" in str(jobs["publish"]["if"])
    assert "PublisherId" in str(jobs["publisher"]["steps"])
