"""Judging a further-trained model against its base and against the controls."""
