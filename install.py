"""A1111 and Forge run this file before they start.

Nothing to install: the extension needs only what they bring, and never touches torch.
"""
