"""The paper's experiments at the paper's scale, for whoever has the data and the GPUs."""
