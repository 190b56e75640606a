"""Boxes, anchors, assignment, non-maximum suppression, RoIAlign and instance masks."""
