"""Static check of an exported graph against what a target's runtime documents."""
