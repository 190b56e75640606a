"""Image classification: loss with mixed and erased images, accuracy, and figures of predictions."""
