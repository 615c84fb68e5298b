"""The data: batches of images and captions from every kind of source."""
