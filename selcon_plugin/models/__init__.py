"""Networks: feature maps, backbones, pretrained weights, normalization, teachers.

Losses, memory banks and the hosts' adapters do not belong here.
"""
