"""nbdmirror: an NBD server with built-in live mirroring to a second NBD export."""

__version__ = "0.1.0"
