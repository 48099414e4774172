"""`python -m sepme_diffusers.cli`, for launchers that take a module."""

from sepme_diffusers.cli.app import app

app()
