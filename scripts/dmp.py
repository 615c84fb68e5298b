"""A1111 and Forge load this file when the repository is cloned into `extensions`.

The extension is not here yet (README.md, "What works today"), so there is nothing to register.
"""
