"""What a training run does, whatever the host: settings, data, network, epochs, records.

Between the methods and the adapters. An adapter translates its host's config, loaders and
checkpoints; when banks are prepared, images clustered, batches drawn and banks written is
said here, once. Nothing here imports a host.
"""
