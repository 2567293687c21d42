"""`./run matrix`: the demo and the tests on several systems, each in a root of its own."""
