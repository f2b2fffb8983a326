"""Between the network and the policy: what a request may be, and how it is answered."""
