"""What setup.cfg cannot say: a wheel holds conf/ and the commit that it was built from, inside the package."""

import json
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class WithConf(build_py):
    """Adds to the package what lies beside it in a checkout, which an editable install reads there."""

    def run(self) -> None:
        """Builds; setuptools calls it."""
        package = Path(self.build_lib, "harness")
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(package, ignore_errors=True)  # an earlier build's, with files that may be gone since
        super().run()
        # A fit of this machine and what its searches have found are not everybody's.
        own = shutil.ignore_patterns("README.md", "local", "local.yaml", "tuned_*.yaml")
        shutil.copytree(ROOT / "conf", package / "conf", ignore=own)
        (package / "built.json").write_text(json.dumps(commit()) + "\n")


def commit() -> dict[str, object] | None:
    """Returns the commit of the checkout that tracks this file, and whether files differ from it; None without one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "harness/__init__.py")  # not a copy inside someone else's checkout
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain", "-uno").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


setup(cmdclass={"build_py": WithConf})
