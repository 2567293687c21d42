"""One mirror, from its start to its pivot. It knows neither libnbd nor files."""
