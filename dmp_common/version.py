"""Name and version, alone in a file: packaging and `dmp --version` read them without torch."""

LIBRARY = "diffusion-model-patching"
__version__ = "0.1.0"
