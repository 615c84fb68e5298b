"""Where images come from: folders, dataset files, Hugging Face, the bundled digits."""
