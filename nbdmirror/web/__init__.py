"""What the servers of a host are doing, over HTTP: for Prometheus, for scripts, for people."""
