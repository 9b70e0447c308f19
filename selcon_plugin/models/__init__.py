"""Networks: feature maps, backbones, pretrained weights, normalization, teachers.

No loss, no memory bank and no host belongs here.
"""
