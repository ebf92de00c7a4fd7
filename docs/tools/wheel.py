"""Build the wheel, check it, and install it into an empty environment without extras.

`python docs/tools/wheel.py --output dist`, in an environment with `build` and `twine`. It downloads what the package depends on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WANTED = ("trl_safety/py.typed", "axolotl_plugin/py.typed", "trl_safety/config/block.py", "trl_safety/training/dual_select/method.py")
UNWANTED = ("tests/", "benchmarks/", "docs/", "example_configs/")
CODE = """
import sys
import trl_safety, axolotl_plugin
assert "site-packages" in trl_safety.__file__, trl_safety.__file__
assert trl_safety.__version__ == sys.argv[1], trl_safety.__version__
assert not {"torch", "transformers"} & set(sys.modules)
for name in trl_safety.__all__:
    getattr(trl_safety, name)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a command; its errors end this one."""
    return subprocess.run([str(part) for part in command], cwd=cwd, check=True, text=True, stdout=subprocess.PIPE).stdout


def build(output: Path) -> Path:
    """The wheel of a fresh build, and the source archive beside it, both accepted by twine."""
    for old in output.glob("trl_safety-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", output)
    run(sys.executable, "-m", "twine", "check", "--strict", *output.glob("trl_safety-*"))
    (wheel,) = output.glob("trl_safety-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if missing := [name for name in WANTED if name not in names]:
        raise SystemExit(f"{wheel.name}: lacks {', '.join(missing)}")
    if spare := [name for name in names if name.startswith(UNWANTED)]:
        raise SystemExit(f"{wheel.name}: holds {spare[0]}")
    return wheel


def try_out(wheel: Path, constraint: Path | None) -> None:
    """Install the wheel into an empty environment, import every public name there, and ask for help."""
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch)
        run(sys.executable, "-m", "venv", empty / "venv")
        constraints = ["-c", constraint.resolve()] if constraint else []
        run(empty / "venv/bin/pip", "install", "--quiet", "--no-compile", wheel.resolve(), *constraints)
        run(empty / "venv/bin/python", "-c", CODE, wheel.name.split("-")[1], cwd=empty)
        if "Usage" not in run(empty / "venv/bin/trl-safety", "--help", cwd=empty):
            raise SystemExit("trl-safety --help: says nothing")
        run(empty / "venv/bin/trl-safety", "methods", cwd=empty)
        run(empty / "venv/bin/pip", "check")


def main() -> None:
    """Build and try out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--constraint", type=Path)
    parser.add_argument("--no-install", action="store_true", help="Only build and check.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    wheel = build(options.output)
    if not options.no_install:
        try_out(wheel, options.constraint)
    print(f"{wheel}: works")


if __name__ == "__main__":
    main()
