"""Help panel *Research*: the paper's comparisons and the stages that a deployment may leave out."""
