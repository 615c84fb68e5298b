"""The frozen base: its weights, encoders and what the trainer must know of its family."""
