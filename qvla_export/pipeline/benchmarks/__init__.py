"""What stands between a policy and the benchmarks of others."""
