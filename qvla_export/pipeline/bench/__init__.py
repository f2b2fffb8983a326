"""What only times: engines, allocation, serving, rates of a CPU, a policy of a published size."""
