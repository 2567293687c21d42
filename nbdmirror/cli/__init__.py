"""The command that people type. Client commands need neither libnbd nor nbdkit."""
