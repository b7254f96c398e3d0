"""The channels of the activation itself, as an autoencoder: what a dictionary has to be better than.

Its 2 d_model latents are max(x_j, 0) and max(-x_j, 0) for each coordinate j of x, with decoder rows that are these
coordinates, so that whatever is measured of an autoencoder's latents can be measured of channels.

Source: Gao et al. 2024, sections 4.2 and 4.5, compare with channels of the residual stream.
"""

import torch

from topkapi.model import Autoencoder


@torch.no_grad()
def channels(d_model: int, device: torch.device | str = "cpu") -> Autoencoder:
    """An autoencoder with activation relu that reconstructs everything, one channel a latent. Memory: 4 d_model^2."""
    ae = Autoencoder(d_model=d_model, n_latents=2 * d_model, k=d_model, activation="relu").to(device)
    for weight in (ae.W_enc, ae.W_dec):
        weight.copy_(torch.cat([torch.eye(d_model), -torch.eye(d_model)]))
    return ae
