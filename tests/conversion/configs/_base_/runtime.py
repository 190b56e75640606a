"""Settings of a run, which do not concern the model."""

import os

checkpoint_config = dict(interval=1)
log_level = "INFO"
load_from = None
workflow = [("train", 1)]
job_name = os.environ.get("JOB_NAME", "none")
