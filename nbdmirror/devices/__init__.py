"""A disk's medium on this machine: files and block devices."""
