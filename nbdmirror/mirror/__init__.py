"""One mirror, from its start to its pivot. Nothing here knows libnbd, files or the state directory."""
