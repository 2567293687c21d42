"""What outlives the process: the state directory, and shared memory."""
