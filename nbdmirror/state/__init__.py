"""What outlives the process: the state directory and memory that is shared with the next process."""
