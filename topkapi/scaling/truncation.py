"""What is lost where shards put fewer latents forward than a token may have (`topkapi.exchange.candidates`)."""

import math
from functools import lru_cache


@lru_cache
def truncation_losses(k: int, n_shards: int) -> tuple[float, ...]:
    """Share of the k largest latents that is lost if each shard puts c of them forward at most, for c = 0 to k.

        n_shards E[max(X - c, 0)] / k,    X ~ Binomial(k, 1 / n_shards)

    That is where latents are spread over shards at random. The truncation: Gao et al. 2024, appendix D.2.
    """
    if n_shards == 1:
        return tuple(1 - c / k for c in range(k + 1))
    p, more, losses = 1 / n_shards, 0.0, [0.0]  # more: the chance that X > c
    for hits in range(k, 0, -1):
        more += math.exp(
            math.lgamma(k + 1)
            - math.lgamma(hits + 1)
            - math.lgamma(k - hits + 1)
            + hits * math.log(p)
            + (k - hits) * math.log1p(-p)
        )
        losses.append(losses[-1] + n_shards / k * more)
    return tuple(reversed(losses))
