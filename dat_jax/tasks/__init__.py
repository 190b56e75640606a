"""Tasks: data, model, loss, prediction, evaluation and figures. One folder per task, and the registry of all."""
