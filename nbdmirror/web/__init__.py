"""The status of all servers of a host, over HTTP: for Prometheus, for scripts, for people."""
