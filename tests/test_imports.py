"""Imports point one way, between packages and inside of the core; a host starts up light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dmp_common", "comfyui_dmp", "a1111_dmp", "training")
HEAVY = {
    *("diffusers", "transformers", "accelerate", "huggingface_hub"),
    *("matplotlib", "pydantic", "sklearn", "einops"),
}
HOSTS = {
    *("comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server"),
    "latent_preview",
    *("modules", "gradio", "ldm", "backend"),
}
HOST_FILES = {
    *("comfyui_dmp/nodes.py", "comfyui_dmp/host.py", "comfyui_dmp/files.py"),
    *("comfyui_dmp/inputs.py", "comfyui_dmp/stack.py", "comfyui_dmp/masks.py"),
    *("comfyui_dmp/promptlist.py", "comfyui_dmp/trainnode.py", "comfyui_dmp/saving.py"),
    *("comfyui_dmp/train.py", "comfyui_dmp/teacher.py", "comfyui_dmp/student.py"),
    *("comfyui_dmp/trained.py", "comfyui_dmp/progress.py", "comfyui_dmp/gradients.py"),
    *("comfyui_dmp/hooked.py", "comfyui_dmp/hooknode.py", "comfyui_dmp/pictures.py"),
    *("comfyui_dmp/places.py", "comfyui_dmp/heatmaps.py"),
    "comfyui_dmp/memory.py",
    *("a1111_dmp/script.py", "a1111_dmp/controls.py", "a1111_dmp/host.py"),
    *("a1111_dmp/cards.py", "a1111_dmp/axes.py", "a1111_dmp/listing.py", "a1111_dmp/tags.py"),
    "a1111_dmp/options.py",
}
# The floors of the core, lowest first; a module imports its own floor and those below.
FLOORS = ("", "bases", "patch", "attach", "tools")
TOP = ("api", "__init__", "__main__")
# The wings of the trainer, lowest first; `run` and `evaluation` stand side by side.
WINGS = ("options", "data", "base", "methods", "objective", "run", "evaluation", "experiments")
APART = {("evaluation", "run")}
MOST_FLOORS = 8
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def modules_of(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package
    }


CORE, TRAINER = modules_of("dmp_common"), modules_of("training")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_of(tree: ast.AST) -> set[str]:
    """Full names of all that is imported below a node, also inside functions.

    `from a.b import c` gives both a.b and a.b.c: c may be a module.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all imports below a node."""
    return {name.split(".")[0] for name in names_of(tree)}


def without_types(tree: ast.Module) -> ast.Module:
    """The module without what only type checkers see."""
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.Module(kept, [])


def at_import(tree: ast.AST) -> list[ast.stmt]:
    """The imports that run when a module is imported: those outside of functions."""
    found: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += at_import(node)
    return found


def floor_of(module: str) -> int:
    parts = module.split(".")
    if len(parts) == 1 or (len(parts) == 2 and parts[1] in TOP):
        return len(FLOORS)
    return FLOORS.index(parts[1] if parts[1] in FLOORS else "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    tree = tree_of(path)
    found = imported(tree)
    allowed = {package} if package == "dmp_common" else {package, "dmp_common"}
    assert not found & set(PACKAGES) - allowed
    assert "tests" not in found
    if name not in HOST_FILES:
        assert not found & HOSTS
    if package in ("dmp_common", "comfyui_dmp", "a1111_dmp"):
        # Lazy imports inside functions are fine, and so are those for type checkers.
        lazy = (ast.FunctionDef, ast.ClassDef, ast.If)
        top = imported(ast.Module([n for n in tree.body if not isinstance(n, lazy)], []))
        assert not top & HEAVY


@pytest.mark.parametrize("module", CORE)
def test_the_floors_of_the_core(module: str) -> None:
    """Imports inside functions count too: a floor must not need one above it to do its work."""
    found = {name for name in names_of(without_types(tree_of(CORE[module]))) if name in CORE}
    above = {name for name in found if floor_of(name) > floor_of(module)}
    assert not above, f"{module} imports from above"


@cache
def imports_between(package: str) -> dict[str, set[str]]:
    """What each module of a package imports of the others, also inside functions."""
    modules = modules_of(package)
    return {
        module: {
            name
            for name in names_of(without_types(tree_of(path)))
            if name in modules and name != module
        }
        for module, path in modules.items()
    }


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along the arrows.

    Raises:
        AssertionError: a circle.
    """
    known: dict[str, list[str]] = {}

    def visit(name: str, way: tuple[str, ...]) -> list[str]:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in known:
            below = [visit(other, (*way, name)) for other in sorted(graph[name])]
            known[name] = [name, *max(below, key=len, default=[])]
        return known[name]

    return max((visit(name, ()) for name in graph), key=len)


@pytest.mark.parametrize("package", ["dmp_common", "training"])
def test_no_circles_between_files(package: str) -> None:
    graph = imports_between(package)
    assert len(graph) > 40
    longest_chain(graph)


def test_the_longest_chain_finds_circles() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(AssertionError, match="a -> b -> a"):
        longest_chain({"a": {"b"}, "b": {"a"}})


def wing_of(module: str) -> str:
    """The folder or file at the top of training/ that a module is in."""
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in TRAINER if name.count(".") > 1])
def test_the_wings_of_the_trainer(module: str) -> None:
    own = wing_of(module)
    found = {wing_of(name) for name in imports_between("training")[module] if name.count(".")}
    above = {name for name in found if WINGS.index(name) > WINGS.index(own)}
    assert not above, f"{module} imports from above"
    assert not {tuple(sorted((own, name))) for name in found} & APART


def test_the_trainer_has_few_floors() -> None:
    """Counted among the folders and files at the top of training/."""
    graph: dict[str, set[str]] = {}
    for module, found in imports_between("training").items():
        if module.count(".") and not module.endswith("__init__"):
            others = {wing_of(name) for name in found if name.count(".")} - {wing_of(module)}
            graph.setdefault(wing_of(module), set()).update(others)
    assert set(graph) == {*WINGS, "train_dmp", "evaluate"}
    chain = longest_chain(graph)
    assert len(chain) <= MOST_FLOORS, " -> ".join(chain)


def test_names_of_the_trainer_stand_once() -> None:
    """Two modules, or two public functions, of one name would be taken for each other."""
    files = [path.stem for path in TRAINER.values() if not path.stem.startswith("__")]
    assert sorted(files) == sorted(set(files))
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [
        node.name
        for path in TRAINER.values()
        for node in tree_of(path).body
        if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "main"
    ]
    assert sorted(defined) == sorted(set(defined))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_stay_in_their_module(path: Path) -> None:
    tree = tree_of(path)
    taken = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES
        for alias in node.names
        if (ROOT / Path(*str(node.module).split(".")) / f"{alias.name}.py").exists()
    }
    taken += [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    ]
    assert not taken


@pytest.mark.parametrize("modules", [CORE, TRAINER], ids=["dmp_common", "training"])
def test_every_module_can_be_imported_first(modules: dict[str, Path]) -> None:
    """No circle of imports, which works from one end only."""
    packages = {name.removesuffix(".__init__"): name for name in modules}
    assert len(packages) > 40
    needs = {}
    for name, path in modules.items():
        found = names_of(ast.Module(at_import(without_types(tree_of(path))), []))
        needs[name] = {packages[other] for other in found if other in packages} - {name}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError


def test_imports_inside_functions_make_no_circle() -> None:
    tree = ast.parse(
        "import a\ndef f():\n    import b\nif True:\n    import c\nclass D:\n    import d"
    )
    assert names_of(ast.Module(at_import(tree), [])) == {"a", "c", "d"}


def test_importing_the_core_loads_nothing_heavy() -> None:
    code = (
        "import sys, dmp_common.api, dmp_common.tools.heatmap, dmp_common.tools.timefile; "
        f"print(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_attach_is_the_function_whatever_was_imported_before() -> None:
    """The folder of the same name must not hide it."""
    code = (
        "import dmp_common.attach.settings, dmp_common, sys; "
        "assert 'dmp_common.attach.attachment' not in sys.modules; "
        "from dmp_common import attach, Patch; "
        "assert attach is dmp_common.attach is sys.modules['dmp_common.attach.attachment'].attach; "
        "assert 'attached' in dir(dmp_common)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
