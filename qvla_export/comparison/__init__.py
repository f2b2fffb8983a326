"""Settings and baselines side by side over seeds: our version of the paper's tables and figures."""
