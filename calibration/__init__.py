"""What the policy sees: recorded or simulated observations, closed-loop rollouts, success."""
