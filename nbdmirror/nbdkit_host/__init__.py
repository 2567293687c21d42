"""The life of the process inside nbdkit: start, signals, end."""
