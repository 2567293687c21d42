"""The control socket: commands as tables, and the conversation."""
