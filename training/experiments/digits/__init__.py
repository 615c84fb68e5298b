"""The bundled `digits` base: a small DiT for 8 x 8 digits, its classifier, how both were made."""
