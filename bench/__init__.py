"""The benchmarks: nbdmirror side by side with its peers. `./run bench --help`."""
