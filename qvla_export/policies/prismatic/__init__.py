"""What families on Prismatic's two towers and Llama share: towers, keys, files, smoothing."""
