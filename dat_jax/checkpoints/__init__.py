"""Checkpoints of runs and folders of weights: writing, integrity, loading and adaptation to other models.

Modules:
  manager: ``Checkpoints``, which saves and restores the state of a run.
  directory: the folders in the directory of a run's checkpoints.
  compatibility: whether a run can be resumed from a checkpoint.
  exports: folders of weights, without an optimizer.
  hub: exports in repositories of the Hugging Face Hub.
  loading: trained weights as a model, or as the start of another training.
  adaptation: weights for another image size, other classes, or a network around the backbone.
  model_description: models as JSON.
  class_names: names of classes beside weights.
  inference_options: options of inference beside weights.
  arrays, orbax_messages: reading and writing with Orbax.
  integrity: digests, and their comparison.
"""
