"""What each task is put together from: its data, model, evaluation and pictures. A module a task, with the same functions.

evaluation: the module of ``dat_jax.evaluation`` whose METRIC chooses the best checkpoint.
load_sources(config), load_eval_sets(config, eval_source): what is trained and evaluated on.
make_task(config, classes=, **overrides), make_evaluate(config, predict, eval_source): what is learned and how it is judged.
make_train_batches(config, source, start_step=, rows=), make_eval_batches(config, source, rows=): the host's part, in numpy.
example_indices(config, source, step=): which images the batch of a step has, over all processes.
example_batch(config, size, train=): shapes and dtypes of a batch to train on, or of one to predict from.
describe_images(config): their size, in words.
save_pictures(config, predict, variables, source, directory): of some examples.
"""

from dat_jax.training.setups import classification, detection, segmentation

SETUPS = {"classification": classification, "segmentation": segmentation, "detection": detection}
