"""Learning new classes from few images, starting from a model that was trained on others."""
