"""Only a part of a data set's settings, which do not concern the model."""

data = dict(samples_per_gpu=4, train=dict(type="ADE20KDataset", data_root="data/ade/ADEChallengeData2016"))
