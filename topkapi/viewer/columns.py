"""The table of all latents that the page shows, sorts and filters."""

import numpy as np

from topkapi.study import Study
from topkapi.viewer.binary import pack
from topkapi.viewer.index import Index


def table(study: Study, index: Index) -> bytes:
    """The table: a study's own columns, and those of its index as far as it is made.

    n_fired (u4); importance, and mean and maximum of firings (f4); kurtosis (f4); modes (u1, 255 where they are not
    counted yet, 0 where the latent never fired); top_token (u4, an index into the header's tokens, 2^32 - 1 for none).
    What a latent that never fired has none of is NaN.
    """
    n_fired = study.n_fired
    with np.errstate(invalid="ignore"):
        mean = np.where(n_fired > 0, study.arrays["sums"] / n_fired, np.nan)
    own = {
        "n_fired": n_fired.astype("<u4"),
        "importance": study.importance.astype("<f4"),
        "mean": mean.astype("<f4"),
        "maximum": np.where(n_fired > 0, study.arrays["maxima"], np.nan).astype("<f4"),
    }
    indexed = {name: array.copy() for name, array in index.arrays.items()}  # before their tokens, which come first
    header = {"n_latents": study.n_latents, "n_tokens": study.n_tokens, "tokens": index.tokens}
    return pack(header, own | indexed)
