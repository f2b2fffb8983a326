"""Which setting to take: errors against demonstrations, bounds, the choice, what comes next."""
