"""Everything is declared in pyproject.toml; the C++ extension of csrc/ will be built from here."""

from setuptools import setup

setup()
