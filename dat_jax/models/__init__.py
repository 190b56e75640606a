"""flax.linen modules.

* ``dat``, ``attention``, ``layers``: the DAT backbone and classifier.
* ``backbone``, ``fpn``: feature maps and pyramids for dense prediction.
* ``segmentation``: SemanticFPN and UperNet.
* ``retinanet``, ``rpn``, ``rcnn``: detectors.
* ``registry``, ``catalogue``: models by name, and facts about them.
* ``key_positions``, ``attention_weights``: key positions and attention weights of the blocks of a model, for figures.
"""
