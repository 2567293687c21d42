"""A disk on another NBD server, through libnbd."""
