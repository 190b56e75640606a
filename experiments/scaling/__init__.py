"""Cost against the size of images and batches."""
