"""The name and version of the package, which its build and `dmp --version` read without torch."""

LIBRARY = "diffusion-model-patching"
__version__ = "0.1.0"
