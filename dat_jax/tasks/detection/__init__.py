"""Object detection and instance segmentation: training targets, losses and the selection of detections."""
