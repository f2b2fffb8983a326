"""UniVLA: latent action tokens, decoded one after the other, and what makes a chunk of them."""
