"""The pure parts of training: data, sharding, states and steps. The loops over them are in the package `train`."""
