"""Sources of examples, transforms of one example, batches. Knows nothing of models."""
