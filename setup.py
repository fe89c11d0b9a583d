"""Installs the package and, where PyTorch and a compiler are there already, the compiled operators of csrc/ with it.

They are never a reason for an installation to fail: `python -m sitfast.build` makes them at any later time, from the
sources that are installed beside the package.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("sitfast_builder", ROOT / "sitfast/builder.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)


class BuildWithOperators(build_py):
    built = False

    def run(self):
        super().run()
        into = ROOT / "sitfast" if self.editable_mode else Path(self.build_lib) / "sitfast"
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", into / "csrc", dirs_exist_ok=True)
        try:
            about = builder.build(into, sources=ROOT / "csrc")
        except Exception as error:
            print(f"sitfast: the compiled operators are not built, PyTorch runs instead: {error}")
        else:
            BuildWithOperators.built = True
            print(f"sitfast: built the compiled operators in {about['seconds']} s")


class TaggedWheel(bdist_wheel):
    """With operators a wheel is for one platform and, since they do not use its interface, for every Python."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        if BuildWithOperators.built and platform == "any":
            from packaging.tags import platform_tags

            platform = next(iter(platform_tags()))
        return python, abi, platform


setup(cmdclass={"build_py": BuildWithOperators, "bdist_wheel": TaggedWheel})
