"""Sessions of the workspace. ``nox -l`` lists them, ``nox`` runs the default ones, ``nox -s demo`` shows the product.

uv makes an environment in about a second; without uv nox falls back to virtualenv.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
DEFAULT = "lint types core_bare tests wheels combined broken_plugins template api browser docs"
nox.options.sessions = DEFAULT.split()

ROOT = Path(__file__).parent
CORE = "./core"
# package -> (folder, extras of it that its tests need, what they need of core)
PACKAGES = {
    "core": (CORE, "", f"{CORE}[torch,transformers,lite,faiss-cpu,digits,report,tables,video,serve,testing]"),
    "compat": ("./packages/compat-plugins", "", f"{CORE}[torch,faiss-cpu,digits,testing]"),
    "detection": ("./packages/detection-plugins", "[testing]", f"{CORE}[torch,digits,testing]"),
    "domain": ("./packages/domain-plugins", "", f"{CORE}[torch,digits,testing]"),
    "mim": ("./packages/mim-plugins", "", f"{CORE}[torch,digits,testing]"),
    "emoji": ("./packages/emoji-plugins", "", f"{CORE}[testing]"),
    "scale": ("./packages/scale-plugins", "[ray,testing]", f"{CORE}[faiss-cpu,serve,testing]"),
    "sparsity": ("./packages/sparsity-plugins", "[onnx,report]", f"{CORE}[torch,digits,testing]"),
    "videotext": (
        "./packages/videotext-plugins",
        "[parquet,tagger,transformers]",
        f"{CORE}[torch,video,digits,testing]",
    ),
}
EVERYTHING = [PACKAGES["core"][2], *(folder for name, (folder, _, _) in PACKAGES.items() if name != "core")]
# One thread per test process: the tests run in parallel, and results do not depend on the number of cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# No model hub, and compiled modules are kept: without them every process would compile torch again.
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}


def install(session: nox.Session, *requirements: str) -> None:
    """Install folders of this repository (editable) and requirements in one resolution, so that siblings are found."""
    arguments = [part for r in requirements for part in (["-e", r] if r.startswith("./") else [r])]
    session.install(*arguments)


def pytest(session: nox.Session, *arguments: str, parallel: bool = True) -> None:
    session.install("pytest-xdist>=3.5")
    spread = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "worksteal"] if parallel else []
    session.run("pytest", "-q", *spread, *arguments, *session.posargs, env={**ONE_THREAD, **QUIET})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting of every file (ruff)."""
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of every package (mypy)."""
    install(session, *EVERYTHING)
    session.install("mypy>=1.11")
    session.run("mypy", *(str(Path(folder) / "src") for folder, _, _ in PACKAGES.values()))


@nox.session
def core_bare(session: nox.Session) -> None:
    """Core without torch, timm or faiss: plugins, galleries, upgrades and the command line still work."""
    install(session, f"{CORE}[testing]")
    session.run("python", "-c", "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('faiss'))")
    pytest(session, "core/tests", "-m", "not slow")


@nox.session
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package with only that package and core installed: ``nox -s "tests(core)"``."""
    folder, extras, needs = PACKAGES[package]
    install(session, needs, *([] if package == "core" else [folder + extras]))
    if package == "core":  # where torch is missing its tests are left out: never here
        session.install("httpx>=0.27")  # the client of the service's tests
        session.run("python", "-c", "import importlib.util as u; assert u.find_spec('torch') and u.find_spec('faiss')")
    pytest(session, f"{folder}/tests")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel and install each alone (with core) in a fresh environment; it lists its methods."""
    session.install("uv>=0.5")
    out = Path(session.create_tmp()).resolve() / "wheels"
    for folder, _, _ in PACKAGES.values():
        session.run("uv", "build", "--quiet", "--wheel", "--out-dir", str(out), folder)
    # uv knows a wheel of --find-links by its name: without this it installs the one that an earlier run has built
    refresh = [part for name in PACKAGES for part in ("--refresh-package", f"bowerbird-{name}")]
    session_python = str(Path(session.bin) / "python")  # by its name uv would look past this environment
    for name, (folder, _, _) in PACKAGES.items():
        venv = Path(session.create_tmp()).resolve() / f"alone-{name}"
        python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
        session.run("uv", "venv", "--quiet", "--clear", "--python", session_python, str(venv))
        own = ["--find-links", str(out), *refresh, f"bowerbird-{name}"]
        session.run("uv", "pip", "install", "--quiet", "--python", str(python), *own)
        smoke = ROOT / folder / "tests" / "smoke.py"
        session.run(str(python), "-I", str(smoke), external=True, env={"PYTHONPATH": ""})


@nox.session
def combined(session: nox.Session) -> None:
    """Integration tests: everything that needs two or more packages."""
    install(session, *EVERYTHING)
    session.install("uv>=0.5", "hatchling>=1.27")  # the tutorial builds and installs a plugin
    pytest(
        session,
        "integration_tests",
        "--ignore=integration_tests/test_broken_plugins.py",
        "--ignore=integration_tests/test_template.py",
        "--ignore=integration_tests/serve",
        "--ignore=integration_tests/browser",
    )


@nox.session
def broken_plugins(session: nox.Session) -> None:
    """Distributions that are broken in different ways: the tool names each and survives."""
    install(session, f"{CORE}[testing]")
    pytest(session, "integration_tests/test_broken_plugins.py")


@nox.session
def template(session: nox.Session) -> None:
    """``bowerbird new-plugin``: scaffold, build, install, contract tests green, used by the command line."""
    install(session, f"{CORE}[torch,testing]")
    session.install("uv>=0.5", "hatchling>=1.27", "editables", "ruff>=0.9")
    pytest(session, "integration_tests/test_template.py", parallel=False)


@nox.session
def api(session: nox.Session) -> None:
    """The HTTP service against its own schema (schemathesis), and hostile requests (a fuzzer)."""
    install(session, f"{CORE}[torch,serve,faiss-cpu,testing]")
    session.install("schemathesis>=4", "httpx>=0.27", "psutil")
    pytest(session, "integration_tests/serve", parallel=False)


@nox.session
def browser(session: nox.Session) -> None:
    """The web page in Chromium: searches, an upgrade from start to finish, keys, a phone, hostile names."""
    install(session, f"{CORE}[torch,serve,faiss-cpu,testing]", "./packages/compat-plugins")  # rank merge
    session.install("playwright>=1.49")  # the package alone: it drives the chromium of the system
    session.env["CHROMIUM"] = chromium_path(session)
    pytest(session, "integration_tests/browser", parallel=False)


def chromium_path(session: nox.Session) -> str:
    """``$CHROMIUM``, or the system's; Debian's is installed where there is none and this is root."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        session.run("apt-get", "update", "-qq", external=True)
        install_it = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
        session.run(*install_it, external=True, env={"DEBIAN_FRONTEND": "noninteractive"})
        found = shutil.which("chromium")
    if found is None:
        session.error("no chromium: run `sudo apt-get install chromium`, or set CHROMIUM to the path of a Chrome")
    return found


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site (strict: a broken link fails) and compare generated pages with their sources."""
    install(session, *EVERYTHING)
    session.install("mkdocs>=1.6", "mkdocs-material>=9.5")
    session.run("python", "docs/generate.py", "--check")
    session.run("python", "benchmarks/table.py", "--check")
    session.run(
        "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(Path(session.create_tmp()).resolve() / "site")
    )


# ------------------------------------------------------------------------------------- not run by default


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on real images: a live gallery moves to a better model. Writes demo-out/index.html."""
    install(session, f"{CORE}[lite,faiss-cpu,report,serve]", "./packages/emoji-plugins", "./packages/compat-plugins")
    # Ctrl-C ends a served demo once what is in flight is answered, and its worker has given its task back.
    session.run("bowerbird", "demo", *session.posargs, env=QUIET, interrupt_timeout=60, terminate_timeout=30)


@nox.session
def lowest(session: nox.Session) -> None:
    """Tests of core with the lowest versions that the packages allow (needs uv)."""
    folder, _, needs = PACKAGES["core"]
    session.install("--resolution", "lowest-direct", "-e", needs, "pytest-xdist")
    pytest(session, f"{folder}/tests")


@nox.session
def claims(session: nox.Session) -> None:
    """Train for the claims of docs/claims.md and write benchmarks/claims/results (takes long)."""
    install(session, *EVERYTHING)
    session.run("python", "benchmarks/claims/run.py", *session.posargs, env=QUIET)


@nox.session
def promises(session: nox.Session) -> None:
    """The promises of an upgrade at full length: 200 kills, 10,000 operations, 1,000 queries (about ten minutes)."""
    install(session, f"{CORE}[faiss-cpu,testing]")
    session.run("python", "benchmarks/promises.py", "--output", "benchmarks/results/promises.json", env=QUIET)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure speed and memory against their limits and write benchmarks/results (takes long)."""
    install(session, *EVERYTHING)
    session.install("psutil")
    session.run("python", "benchmarks/run.py", *session.posargs, env=QUIET)
