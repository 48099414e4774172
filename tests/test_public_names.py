"""What `import sepme_diffusers` gives, and what it leaves for later."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import sepme_diffusers

HEAVY = ("torch", "diffusers", "transformers", "typer", "rich")


@pytest.mark.parametrize("use", ["None", "sepme_diffusers.__version__"], ids=["import", "version"])
def test_the_import_loads_nothing_heavy(use):
    check = f"import sys, sepme_diffusers; {use}; print([name for name in {HEAVY} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_the_version_is_the_installed_one():
    assert sepme_diffusers.__version__ == version("sepme-diffusers")


@pytest.mark.parametrize("name", sepme_diffusers.__all__)
def test_every_public_name_is_there(name):
    assert getattr(sepme_diffusers, name) is not None
