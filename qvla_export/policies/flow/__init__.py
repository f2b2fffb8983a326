"""What families share whose expert integrates a flow and reads a language model's keys."""
