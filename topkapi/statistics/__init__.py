"""What the numbers of a trained dictionary amount to: pure functions of arrays, with intervals, that draw nothing.

1. `densities`: distributions of densities and importances over latents, and how dense a solution is
2. `modes`: whether a sample has one mode, and how many it has
3. `laws`: how the loss falls with the number of latents, k and compute
4. `matching`: which latents two dictionaries share

Whatever is random takes a seed, and gives the same numbers for the same seed.
"""
