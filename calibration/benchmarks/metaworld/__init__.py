"""Meta-World: simulator, tasks, scripted experts and the demonstrations they give."""
