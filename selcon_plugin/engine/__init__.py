"""The parts of a training run that do not depend on the host.

This folder holds the training images, the network, one step, the epochs around it, the
guard against non-finite values and progress. The adapters translate a host's config,
loaders and checkpoints; methods, config keys and the files of a run have folders of their
own.
"""
