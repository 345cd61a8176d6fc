"""Parts of the benchmarks of deployed federations: starting one, watching processes, its peer."""
